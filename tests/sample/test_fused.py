"""Drawing over fused layers gives what the plain decoder draws: text read once, every step, adapters as they are."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hdl.adapter.formats import read_adapter_file
from hdl.adapter.lora import adapter_parameters, attach, save_adapter
from hdl.adapter.stack import attach_adapters, set_adapters
from hdl.config import Lora
from hdl.golden import check_case, open_golden
from hdl.kernels import attention, gemm, picture_attention, steps
from hdl.kernels.attention import CudnnCalls, Sequences
from hdl.kernels.fuse import FusedDecoder, fuse, fuse_to_draw, fused_decoder
from hdl.kernels.linears import Buffer
from hdl.kernels.steps import Canvas, CapturedStep, Reading, StepGraphs
from hdl.o1.attention import attend
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.decoder import O1, References
from hdl.o1.layout import Seen, Segment, lay_out
from hdl.o1.patches import PATCH_DIM
from hdl.sample.reading import predictor
from tests.kernels.test_fused import REAL, SMALL, Case, adapted_model, distance

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
no_gpu = pytest.mark.skipif(GPU, reason="imitates one")
MIXED = [Segment(9, 2, 3), Segment(2, 1, 1), Segment(14, 3, 2), Segment(9, 2, 3)]
REFERENCES = [
    Segment(12, 2, 2, references=((1, 2), (2, 1)), seen=(Seen(2, 2, 2), Seen(7, 1, 2))),
    Segment(5, 2, 1),
]


@pytest.fixture(autouse=True)
def formulas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "interpreted" not in request.keywords:
        monkeypatch.setenv("TRITON_INTERPRET", "0")


class Drawn:
    """A run's text and noise, two times and references, and what a model predicts of them."""

    def __init__(self, segments: list[Segment], dim: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.layout = lay_out(segments).to(DEVICE)
        self.text = draw(sum(s.text for s in segments), dim) * 0.05
        self.z = draw(sum(s.patches for s in segments), PATCH_DIM) * 4
        self.t = torch.rand(len(segments), generator=generator).to(DEVICE)
        self.references = None
        if len(self.layout.reference_index):
            seen = len(self.layout.seen_index)
            patches = draw(len(self.layout.reference_index), PATCH_DIM)
            self.references = References(patches, [draw(seen, dim) * 0.05 for _ in range(2)])

    def steps(self, model: nn.Module, count: int = 3, once: bool = True) -> list[Tensor]:
        predict = predictor(model, self.text, self.layout, self.references, once=once)
        return [predict(self.z * (-1) ** i, self.t / (i + 1)).float() for i in range(count)]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert distance(a, b) < bound


@pytest.mark.parametrize("stream", [0, 2])
@pytest.mark.parametrize(
    "segments", [MIXED, MIXED[:1] * 2, MIXED[1:2], REFERENCES], ids=["mixed", "alike", "least", "edit"]
)
def test_every_step_is_the_plain_ones(segments: list[Segment], stream: int) -> None:
    drawn, model = Drawn(segments, SMALL.hidden_size), adapted_model(SMALL)
    plain, whole = drawn.steps(model), drawn.steps(model, once=False)
    fuse_to_draw(model, stream=stream)
    assert_near(drawn.steps(model), plain)
    assert_near(drawn.steps(model, once=False), whole)


@pytest.mark.interpreted
def test_the_kernels_themselves() -> None:
    drawn, model = Drawn([Segment(3, 2, 1), Segment(4, 1, 2)], SMALL.hidden_size), adapted_model(SMALL)
    plain = drawn.steps(model, 1)
    fuse_to_draw(model)
    assert_near(drawn.steps(model, 1), plain)


@pytest.mark.parametrize("file", ["sample_full", "sample_dev", "edit2"])
def test_golden_pictures(file: str, golden: Path) -> None:
    """The model's own pictures, each with the text read once and in every step."""
    opened, cases = open_golden(golden)
    [case] = [case for case in cases if case["file"] == f"{file}.safetensors"]
    fuse_to_draw(opened.model)
    assert [check for check in check_case(opened, case) if not check.passed] == []


def test_what_a_captured_step_reads_stays_where_it_is() -> None:
    """A graph would read the numbers of whichever run was loaded first, long after that is gone."""
    model = adapted_model(SMALL)
    fuse_to_draw(model)
    fused = fused_decoder(model)
    assert fused
    readings = []
    for _ in range(2):
        text = torch.randn(sum(s.text - 1 for s in MIXED), SMALL.hidden_size).to(DEVICE)
        readings.append(Reading(fused, text, lay_out(MIXED).to(DEVICE)))
    canvas = Canvas(readings[0], torch.empty_like(readings[0].kept))

    def places() -> list[int]:
        attention = canvas.attention
        read = [canvas.cos, canvas.sin, canvas.kept, *(t for group in attention.groups for t in group)]
        return [tensor.data_ptr() for tensor in read]

    before = places()
    canvas.load(readings[1])
    assert places() == before and torch.equal(canvas.kept, readings[1].kept)


def test_without_any_adapter() -> None:
    drawn, model = Drawn(MIXED, SMALL.hidden_size), adapted_model(SMALL).unload()
    assert isinstance(model, O1)
    plain = drawn.steps(model)
    fuse_to_draw(model)
    assert_near(drawn.steps(model), plain)


@pytest.mark.parametrize("weights", ["fp8", "fp8_stored"])
@pytest.mark.parametrize("stream", [0, 3])
def test_other_forms_draw_what_they_compute_whole(weights: str, stream: int) -> None:
    """Text read once changes nothing in fp8 either, where rounding is the form's own."""
    drawn, model = Drawn(MIXED, SMALL.hidden_size), adapted_model(SMALL)
    exact = drawn.steps(model)
    fuse_to_draw(model, weights=weights, stream=stream)
    found = drawn.steps(model)
    assert_near(found, drawn.steps(model, once=False), 1e-3)
    assert_near(found, exact, 0.1)
    assert distance(found[0], exact[0]) > 0.003


@pytest.mark.parametrize("stream", [0, 3])
def test_a_model_in_training_draws_so_too(stream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without text in its steps, and the next training pass is what it would have been."""
    drawn, case = Drawn(MIXED, SMALL.hidden_size), Case(SMALL, MIXED)
    models = [adapted_model(SMALL) for _ in range(2)]
    plain = drawn.steps(models[0])
    for model in models:
        fuse(model, stream=stream)
        case.run(model)
    fused = fused_decoder(models[0])
    assert fused and fused.step_graphs is None
    with monkeypatch.context() as patched:
        patched.setattr(fused, "passes", None)  # of whole runs
        assert_near(drawn.steps(models[0]), plain)
    (x_pred, gradients), (expected, expected_gradients) = (case.run(model) for model in models)
    assert torch.equal(x_pred, expected)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_steps_compute_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(SMALL)
    fuse_to_draw(model)
    fused = fused_decoder(model)
    assert fused
    fused.step_graphs = None  # whose launches nobody sees
    counted: list[int] = []
    down = fused.layers[0].down
    lower = down.lower_input

    def watched(x: Buffer) -> None:
        counted.append(len(x.wide))
        lower(x)

    monkeypatch.setattr(down, "lower_input", watched)
    Drawn([Segment(300, 1, 1), Segment(40, 2, 1)], SMALL.hidden_size).steps(model)
    assert counted == [338, 5, 5, 5]


def adapters(tmp_path: Path) -> tuple[PeftModel, PeftModel]:
    """The tiny base twice with three adapters of different ranks and targets: plain, and fused to draw."""
    base = open_checkpoint(Path(__file__).parents[1] / "golden" / "o1-tiny")
    files = {}
    for i, (name, targets) in enumerate(
        [("a", None), ("b", ["v_proj", "up_proj"]), ("c", ["q_proj", "proj1"])]
    ):
        lora = Lora(rank=2 + i, alpha=3.0, **({"targets": targets} if targets else {}))
        adapted = attach(load_model(base, DEVICE, torch.float32), lora, "", i)
        generator = torch.Generator().manual_seed(i)
        drawn = {
            n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in adapter_parameters(adapted).items()
        }
        save_adapter(adapted, drawn, tmp_path / name)
        files[name] = read_adapter_file(tmp_path / name)
    plain, fused = (
        attach_adapters(load_model(base, DEVICE, torch.float32, absent=absent), files)
        for absent in (False, True)
    )
    fuse_to_draw(fused)
    return plain, fused


def test_adapters_are_switched_and_weighted_in_place(tmp_path: Path) -> None:
    plain, fused = adapters(tmp_path)
    drawn = Drawn(MIXED, 64)
    seen: list[Tensor] = []
    for weights in ({"a": 1.0}, {}, {"b": 0.5, "c": -2.0}, {"a": 0.25}, {"a": 0.3, "b": 1.0, "c": 1.0}):
        for model in (plain, fused):
            set_adapters(model, weights)
        expected = drawn.steps(plain)
        assert_near(drawn.steps(fused), expected)
        assert all(distance(expected[0], other) > 1e-3 for other in seen)
        seen.append(expected[0])


# What cuDNN is told, on a machine without it.


@pytest.fixture
def variable_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by sequences' starts and lengths in place of cuDNN's; bounds that are too low are an error."""

    def by_sequences(
        self: CudnnCalls, sequences: Sequences, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> None:
        for i in range(sequences.count):
            n, m = int(sequences.query_lengths[i]), int(sequences.key_lengths[i])
            assert 0 < n <= sequences.longest_query and n <= m <= sequences.longest_key
            at, at_key = int(sequences.query_starts[i]), int(sequences.key_starts[i])
            asks, keys, values = q[at : at + n], k[at_key : at_key + m], v[at_key : at_key + m]
            out[at : at + n] = attend(asks[None], keys[None], values[None], sequences.causal)[0].flatten(-2)

    for module in (picture_attention, steps):
        monkeypatch.setattr(module, "needs_exact_frame", lambda device, dtype: False)
    monkeypatch.setattr(CudnnCalls, "attend", by_sequences)


@no_gpu
@pytest.mark.usefixtures("variable_length")
@pytest.mark.parametrize("segments", [MIXED, MIXED[1:2], REFERENCES], ids=["mixed", "least", "edit"])
def test_sequences_are_where_attention_is_told(segments: list[Segment]) -> None:
    drawn, model = Drawn(segments, SMALL.hidden_size), adapted_model(SMALL)
    plain = drawn.steps(model)
    fuse_to_draw(model)
    assert_near(drawn.steps(model), plain)


def decoder_to_draw(weights: str = "full") -> tuple[PeftModel, FusedDecoder]:
    model = adapted_model(SMALL)
    fuse_to_draw(model, weights=weights)
    fused = fused_decoder(model)
    assert fused
    return model, fused


def reading_of(fused: FusedDecoder, segments: list[Segment], seed: int) -> tuple[Reading, Tensor]:
    """A reading of random text, and some x."""
    generator = torch.Generator().manual_seed(seed)
    layout = lay_out(segments)
    text = torch.randn(sum(s.text - 1 for s in segments), SMALL.hidden_size, generator=generator)
    reading = Reading(fused, text.to(DEVICE), layout.to(DEVICE))
    return reading, torch.randn(reading.gen.tokens, SMALL.hidden_size, generator=generator).to(DEVICE)


@no_gpu
@pytest.mark.usefixtures("variable_length")
def test_what_is_captured_serves_every_reading_of_its_frame() -> None:
    """Other texts, and pictures of other shapes as long as they are as many rows."""
    _, fused = decoder_to_draw()
    first, _ = reading_of(fused, [Segment(9, 2, 3), Segment(40, 2, 2)], 0)
    canvas = Canvas(first, torch.full_like(first.kept, torch.nan))
    for seed, segments in enumerate(
        ([Segment(120, 2, 2), Segment(90, 3, 2)], [Segment(2, 6, 1), Segment(2, 1, 4)])
    ):
        reading, x = reading_of(fused, segments, seed)
        assert reading.frame == first.frame
        canvas.load(reading)
        assert torch.equal(canvas.step(fused, x), reading.step(x))
    for other in (
        [Segment(9, 2, 3)],
        [Segment(9, 2, 3), Segment(40, 2, 3)],
        [Segment(300, 2, 3), Segment(40, 2, 2)],
    ):
        assert reading_of(fused, other, 0)[0].frame != first.frame


class Counted(CapturedStep):
    """Replays what it would have captured."""

    made = 0
    room = 9

    def __init__(self, reading: Reading, x: Tensor, pool: object) -> None:
        if Counted.room == 0:
            raise torch.OutOfMemoryError("full")
        Counted.room -= 1
        Counted.made += 1
        self.frame, self.reading = reading.frame, reading

    def replay(self, reading: Reading, x: Tensor) -> Tensor:
        return Canvas(reading, reading.kept).step(reading.fused, x)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(Counted, "made", 0)
    monkeypatch.setattr(Counted, "room", 9)
    monkeypatch.setattr(steps, "CapturedStep", Counted)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return Counted


def test_a_frame_is_captured_at_its_second_step(counted: type[Counted]) -> None:
    _, fused = decoder_to_draw()
    graphs = fused.step_graphs = StepGraphs()
    for rows in range(1, steps.MAX_GRAPHS + 2):
        reading, x = reading_of(fused, [Segment(9, rows, 1)], 0)
        first = reading.step(x)
        assert counted.made == rows - 1
        assert all(torch.equal(reading.step(x), first) for _ in range(3)) and counted.made == rows
    assert [c.frame.gen for c in graphs.captured] == [3, 4, 5, 6]  # the longest unused one went
    again, x = reading_of(fused, [Segment(9, 3, 1)], 1)
    again.step(x)
    assert counted.made == steps.MAX_GRAPHS + 1  # known: replayed from its first step on
    assert [c.frame.gen for c in graphs.captured] == [3, 5, 6, 4]
    with graphs.paused():
        again.step(x)
        again.step(x)
    assert counted.made == steps.MAX_GRAPHS + 1 and not graphs.captured
    again.step(x)
    assert [c.frame.gen for c in graphs.captured] == [4]


def test_without_memory_for_a_graph_steps_are_plain(
    counted: type[Counted], capsys: pytest.CaptureFixture[str]
) -> None:
    _, fused = decoder_to_draw()
    graphs = fused.step_graphs = StepGraphs()
    counted.room = 1
    for rows in (1, 2):
        reading, x = reading_of(fused, [Segment(9, rows, 1)], 0)
        found = [reading.step(x) for _ in range(3)]
        assert all(torch.equal(step, found[0]) for step in found)
    assert counted.made == 1 and not graphs.captured  # what was held was given up first
    assert capsys.readouterr().out.count("not enough memory for CUDA graphs") == 1


# On a GPU.

gpu = pytest.mark.skipif(not GPU, reason="no GPU")
LARGE = [Segment(77, 30, 34), Segment(20, 28, 36), Segment(400, 32, 32), Segment(6, 32, 32)]


@gpu
@pytest.mark.parametrize("segments", [[Segment(160, 32, 32)], LARGE], ids=["1024x1", "mixed"])
def test_gpu_bfloat16_is_as_near_to_float32_as_the_plain_path(segments: list[Segment]) -> None:
    drawn = Drawn(segments, REAL.hidden_size)
    exact = drawn.steps(adapted_model(REAL))
    model = adapted_model(REAL, torch.bfloat16)
    plain = drawn.steps(model)
    fuse_to_draw(model)
    for found, near, right in zip(drawn.steps(model), plain, exact):
        assert distance(found, right) <= 1.5 * distance(near, right)


@gpu
@pytest.mark.parametrize(("weights", "bound"), [("fp8", 0.05), ("fp8_stored", 0.05), ("nf4", 0.3)])
def test_gpu_other_forms_stay_near_bfloat16(weights: str, bound: float) -> None:
    drawn = Drawn(LARGE, REAL.hidden_size)
    model = adapted_model(REAL, torch.bfloat16)
    plain = drawn.steps(model)
    fuse_to_draw(model, weights=weights)
    found = drawn.steps(model)
    assert_near(found, plain, bound)
    assert_near(found, drawn.steps(model, once=False), 0.02)


@gpu
@pytest.mark.parametrize("weights", ["full", "fp8", "nf4"])
def test_gpu_replays_equal_plain_steps(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings of one frame taking turns, of another between them, the adapter switched and changed."""
    monkeypatch.setattr(gemm, "measure", False)  # which algorithm wins a race may differ
    models = [adapted_model(SMALL, torch.bfloat16) for _ in range(2)]
    for model in models:
        fuse_to_draw(model, weights=weights)
    replaying, plain = (fused_decoder(model) for model in models)
    assert replaying and plain and replaying.step_graphs
    plain.step_graphs = None
    runs = [Drawn([Segment(9, 2, 3), Segment(40, 2, 2)], SMALL.hidden_size, seed) for seed in range(2)]
    runs += [
        Drawn([Segment(100, 3, 2), Segment(2, 1, 4)], SMALL.hidden_size, 3),
        Drawn(MIXED, SMALL.hidden_size, 4),
    ]
    predicts = [[predictor(model, run.text, run.layout) for run in runs] for model in models]
    for turn in range(4):
        for run, one, other in zip(runs, *predicts):
            assert torch.equal(one(run.z, run.t / (turn + 1)), other(run.z, run.t / (turn + 1)))
        for model in models:
            for name, parameter in adapter_parameters(model).items():
                if "lora_B" in name:
                    parameter.data.mul_(-0.5)
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.enable_adapters(turn % 2 == 0)
    frames = 2 if not attention.needs_exact_frame(DEVICE, torch.bfloat16) else 3
    assert len(replaying.step_graphs.captured) == frames


@gpu
@pytest.mark.parametrize("weights", ["full", "fp8", "nf4"])
def test_gpu_streamed_layers_draw_the_same(weights: str) -> None:
    drawn = Drawn(LARGE, REAL.hidden_size)
    found = []
    for stream in (0, 2):
        model = adapted_model(REAL, torch.bfloat16)
        fuse_to_draw(model, weights=weights, stream=stream)
        found.append(drawn.steps(model))
    assert_near(found[1], found[0], 0.01)
