"""The whole measurement: build the arms, measure the ceilings, then every case with all arms in turn.

If the arms do not fit into the GPU's memory together, the cases that are left run in pairs, the stock arm and
one other taking turns; if a pair does not fit, its two run one after the other, and such figures are marked,
because they are not from alternating steps.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from hdl.bench.arms import STOCK, Arm, Setup
from hdl.bench.cases import Case, useful_flops
from hdl.bench.ceilings import attention_ceiling, fp8_gemm_ceiling, gemm_ceiling
from hdl.bench.profile import Profile, record_kernels, summarize
from hdl.bench.timing import Measured, Say, built, give_back, measure, step_batches
from hdl.errors import ran_out_of_memory
from hdl.kernels.backend import has_fp8

PROFILED_STEPS = 3


@dataclass
class CaseResult:
    """ceilings: TFLOP/s of GEMMs by precision, and of "attention". alone: arms that took no turns with stock."""

    case: Case
    tokens: float  # a step, on average
    flops: float  # useful ones a step, on average
    ceilings: dict[str, float]
    alone: list[str] = field(default_factory=list)
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
        with built(group, partial(_arm, setup, say), setup.device, say) as (arms, held):
            for case in todo:
                found = measure(case, arms, held, setup.checkpoint.config, steps, warmup)
                if STOCK in found:
                    for measured in found.values():
                        measured.stock_time = found[STOCK].step_time
                results[case.name].arms |= found
                for arm in arms if profiled else []:
                    if arm.name != STOCK:
                        with held.by(arm.name):  # graphs it had are gone afterwards
                            results[case.name].profiles[arm.name] = _profile(arm, case, setup, warmup)
                times = ", ".join(f"{name} {m.step_time * 1e3:.1f} ms" for name, m in found.items())
                say(f"{case.name}: {times}")

    def attempt(group: Sequence[str], todo: Sequence[Case]) -> list[Case]:
        """Measure in order; the cases from the first that did not fit on."""
        if _fits(lambda: run(group, todo)):
            return []
        left = [case for case in todo if any(name not in results[case.name].arms for name in group)]
        if left:
            lacking = f"{' and '.join(group)} did not fit into memory"
            say(f"{lacking} {'together' if len(group) > 1 else 'even alone'} at {left[0].name}")
        return left

    left = attempt(names, cases)
    others = [name for name in names if name != STOCK] if STOCK in names and len(names) > 2 else []
    pairs = [[STOCK, name] for name in others] or [[name] for name in names]
    for pair in pairs if left else []:
        together = attempt(pair, left) if len(pair) > 1 else left
        for name in pair:
            todo = [case for case in together if name not in results[case.name].arms]
            for case in todo:
                results[case.name].alone.append(name)
            while todo:
                todo = attempt([name], todo)[1:]  # what does not fit alone is left out
    return list(results.values())


def _arm(setup: Setup, say: Say, name: str) -> Arm:
    if name == "fp8" and not has_fp8(setup.device):
        say("no fp8 arithmetic here (Ada GPUs and newer have it): arm fp8 is the same as bf16")
    return Arm(name, setup)


def _fits(run: Callable[[], None]) -> bool:
    """Whether it ran; its frames, and all they hold, are gone on return."""
    try:
        run()
        return True
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
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
    timeline = record_kernels(steps)
    with arm.without_graphs():
        steps()
        annotated = record_kernels(steps, annotated=True)
    return summarize(timeline, annotated, PROFILED_STEPS)


def _figures(ceilings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items())
