import pytest

from hdl.bench.cases import all_cases
from hdl.bench.profile import Event, annotated_family, busy, classify, named_family, read_events, summarize
from hdl.bench.report import as_markdown
from hdl.bench.run import CaseResult
from hdl.bench.timing import Measured

MAIN, SIDE = (0, 7), (0, 20)


def kernel(name: str, start: float, duration: float, stream: tuple[int, int] = MAIN) -> Event:
    return Event(name, start, duration, stream)


def region(name: str, start: float, duration: float, stream: tuple[int, int] = MAIN) -> Event:
    return Event(name, start, duration, stream, is_range=True)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", "gemm"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassB_f32_aligned_64x64_k128_sm80", "attention"),
        ("_lora_grad_kernel", "lora"),
        ("_quantize_rows_kernel", "quantization"),
        ("_rms_norm_quantize_kernel", "elementwise"),
        ("_swiglu_backward_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float>>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("Memset (Device)", "copy"),
    ],
)  # fmt: skip
def test_families_by_name(name: str, family: str) -> None:
    assert named_family(name) == family


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("hdl::lora", "lora"),
        ("hdl::optimizer", "optimizer"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("hdl::nonsense", None),
        ("lora", None),
        ("ProfilerStep#3", None),
    ],
)
def test_families_by_annotation(name: str, family: str | None) -> None:
    assert annotated_family(name) == family


def test_the_innermost_annotation_on_the_same_stream_decides() -> None:
    events = [
        region("hdl::attention", 0, 100),
        region("unknown", 5, 50),
        region("hdl::lora", 10, 20),
        kernel("nvjet_a", 0, 5),
        kernel("nvjet_b", 10, 20),
        kernel("nvjet_c", 30, 5),
        kernel("nvjet_d", 100, 5),
        kernel("nvjet_e", 12, 5, SIDE),
    ]
    found = {event.name: family for event, family in classify(reversed(events))}
    assert found == {
        "nvjet_a": "attention",
        "nvjet_b": "lora",
        "nvjet_c": "attention",
        "nvjet_d": "gemm",
        "nvjet_e": "gemm",
    }


def test_busy_is_the_union_over_streams() -> None:
    assert (
        busy([kernel("a", 0, 10), kernel("b", 5, 10, SIDE), kernel("c", 20, 5), kernel("d", 21, 1, SIDE)])
        == 20
    )


def test_a_summary_is_a_steps_milliseconds() -> None:
    timeline = [kernel("nvjet", 1000, 4000), kernel("add", 2000, 1000, SIDE), kernel("nvjet", 7000, 2000)]
    annotated = [kernel("nvjet", 0, 4000), kernel("add", 9000, 1000, SIDE), kernel("nvjet", 90000, 2000)]
    profile = summarize(timeline, annotated, steps=2)
    assert profile.span == 4.0 and profile.idle == 1.0
    assert profile.families["gemm"] == 3.0 and profile.families["elementwise"] == 0.5
    assert sum(profile.families.values()) == 3.5
    assert profile.kernels == [("gemm", "nvjet", 1.0, 3.0), ("elementwise", "add", 0.5, 0.5)]
    assert profile.gaps == [("nvjet", "nvjet", 0.5, 1.0)]


def test_a_trace_is_read_for_what_the_gpu_did() -> None:
    def entry(cat: str, name: str) -> dict[str, object]:
        return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": 1.5, "dur": 2}

    trace = {
        "traceEvents": [
            entry("cpu_op", "aten::mm"),
            entry("kernel", "nvjet"),
            entry("user_annotation", "hdl::lora"),
            entry("gpu_user_annotation", "hdl::lora"),
            entry("cuda_runtime", "cudaLaunchKernel"),
            entry("gpu_memcpy", "Memcpy HtoD"),
            {"ph": "M", "name": "process_name", "pid": 0},
        ]
    }
    assert read_events(trace) == [
        kernel("nvjet", 1.5, 2),
        region("hdl::lora", 1.5, 2),
        kernel("Memcpy HtoD", 1.5, 2),
    ]


def test_a_report_tells_idle_time_with_and_without_the_profiler() -> None:
    profile = summarize([kernel("nvjet", 0, 8000), kernel("add", 10000, 1000)], [kernel("nvjet", 0, 8000)], 1)
    case = all_cases(tiny=True)["1024x1"]
    measured = Measured("bf16", [0.010] * 5, [10] * 5, [1e9] * 5)
    result = CaseResult(case, 10, 1e9, {"bf16": 1.0}, arms={"bf16": measured}, profiles={"bf16": profile})
    row = next(
        line for line in as_markdown([result]).splitlines() if line.startswith("| bf16") and "18.2%" in line
    )
    assert row.split("|")[-2].strip() == "10.0%"  # 9 ms busy of a step of 10
    assert "nvjet" in as_markdown([result]).split("idle ms")[1]
