"""The whole measurement: build the arms, measure the ceilings, then every case with all arms in turn.

If the arms do not fit into the GPU's memory together, the cases that are left run with one arm after
another; such figures are marked, because they are not from alternating steps.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hdl.bench.arms import STOCK, Arm, Setup
from hdl.bench.cases import Case, useful_flops
from hdl.bench.ceilings import attention_ceiling, fp8_gemm_ceiling, gemm_ceiling
from hdl.bench.profile import Profile, profile_steps
from hdl.bench.timing import Held, Measured, give_back, measure, step_batches
from hdl.kernels.backend import has_fp8

PROFILED_STEPS = 3
Say = Callable[[str], None]


@dataclass
class CaseResult:
    """ceilings: TFLOP/s of GEMMs by precision, and of "attention". alternating: whether the arms took turns."""

    case: Case
    tokens: float  # a step, on average
    flops: float  # useful ones a step, on average
    ceilings: dict[str, float]
    alternating: bool = True
    arms: dict[str, Measured] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)


def run_cases(
    cases: Sequence[Case],
    names: Sequence[str],
    setup: Setup,
    *,
    steps: int,
    warmup: int,
    profiled: bool,
    say: Say,
) -> list[CaseResult]:
    """Measure every case; an arm that does not fit even alone is missing from that case's result."""
    results = {
        case.name: _with_ceilings(case, setup, range(warmup + 1, warmup + 1 + steps)) for case in cases
    }
    for result in results.values():
        say(f"{result.case.name}: ceilings in TFLOP/s: {_figures(result.ceilings)}")

    def run(group: Sequence[str], todo: Sequence[Case]) -> None:
        with built(group, setup, say) as (arms, held):
            for case in todo:
                found = measure(case, arms, held, setup.checkpoint.config, steps, warmup)
                profiles = {
                    arm.name: _profile(arm, case, setup, warmup)
                    for arm in arms
                    if profiled and arm.name != STOCK
                }
                results[case.name].arms |= found
                results[case.name].profiles |= profiles
                times = ", ".join(f"{name} {m.step_time * 1e3:.1f} ms" for name, m in found.items())
                say(f"{case.name}: {times}")

    if _fits(lambda: run(names, cases)):
        return list(results.values())
    left = [case for case in cases if not results[case.name].arms]
    say(f"not enough memory for {', '.join(names)} together at {left[0].name}: one arm after another")
    for case in left:
        results[case.name].alternating = False
    for name in names:
        todo = left
        while todo and not _fits(lambda: run([name], todo)):  # noqa: B023  # called at once
            unmeasured = [case for case in todo if name not in results[case.name].arms]
            say(f"{name} does not fit into memory at {unmeasured[0].name}, even alone")
            todo = unmeasured[1:]
    return list(results.values())


@contextmanager
def built(names: Sequence[str], setup: Setup, say: Say) -> Iterator[tuple[list[Arm], Held]]:
    """The arms, all resident, and what each holds; their memory is free again afterwards."""
    held, arms = Held(setup.device), list[Arm]()
    try:
        for name in names:
            with held.by(name):
                arms.append(Arm(name, setup))
            allocated, _ = held.by_arm[name]
            say(f"built {name}" + (f", {allocated / 2**30:.1f} GiB" if allocated else ""))
            if name == "fp8" and not has_fp8(setup.device):
                say("no fp8 arithmetic here (Ada GPUs and newer have it): arm fp8 is the same as bf16")
        yield arms, held
    finally:
        for arm in arms:
            arm.close()
        arms.clear()
        give_back()


def _fits(run: Callable[[], None]) -> bool:
    """Whether it ran; its frames, and all they hold, are gone on return."""
    try:
        run()
        return True
    except torch.OutOfMemoryError:
        pass
    gc.collect()
    give_back()
    return False


def _with_ceilings(case: Case, setup: Setup, steps: range) -> CaseResult:
    config, device, dtype = setup.checkpoint.config, setup.device, setup.dtype
    all_segments = [case.segments(step) for step in steps]
    tokens = sum(s.tokens for segments in all_segments for s in segments) / len(steps)
    flops = sum(useful_flops(config, segments) for segments in all_segments) / len(steps)
    rows = round(tokens)
    ceilings = {"bf16" if dtype == torch.bfloat16 else "fp32": gemm_ceiling(config, rows, dtype, device)}
    if has_fp8(device):
        ceilings["fp8"] = fp8_gemm_ceiling(config, rows, device)
    ceilings["attention"] = attention_ceiling(config, case.images, rows // case.images, dtype, device)
    give_back()
    return CaseResult(case, tokens, flops, ceilings)


def _profile(arm: Arm, case: Case, setup: Setup, first: int) -> Profile:
    numbers = range(first, first + PROFILED_STEPS)
    batches = [step_batches(case, [arm], setup.checkpoint.config, n)[arm.name] for n in numbers]

    def steps() -> None:
        for number, batch in zip(numbers, batches):
            arm.step(number, batch)

    steps()  # the allocator's blocks are back in place
    return profile_steps(steps, PROFILED_STEPS)


def _figures(ceilings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items())
