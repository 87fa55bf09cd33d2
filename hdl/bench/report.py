"""What was measured, as Markdown that reads well in a terminal, and as plain data for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hdl.bench.arms import STOCK
from hdl.bench.profile import FAMILIES, Profile
from hdl.bench.run import CaseResult
from hdl.bench.timing import Measured

GIB = 2**30
HEAD = (
    "arm", "ms", "min", "max", "x stock", "tokens/s", "TFLOP/s", "of ceiling", "alloc. GiB", "reserved GiB",
)  # fmt: skip
MIXED, FULL_RATE = "mixed", "1024x4"  # a mixed stream's tokens/s are compared with four equal images'
NOTES = """\
ms: median, fastest and slowest step, everything included. TFLOP/s: useful work only, attention included; its ceiling
is that of GEMMs alone in the precision in which the arm multiplies with its frozen weights. GiB: peaks of the arm's
own steps, less what the other arms hold; reserved includes what CUDA graphs keep between steps, alloc. does not."""
IDLE = """\
idle share: of the profiled span, whose gaps the profiler stretches; unprofiled: of the timed step, what is left of it
after the time in which a profiled step had the GPU busy."""
STOCK_MIXED = "stock takes images of several sizes one by one and adds up their gradients"
ALONE = "did not fit into memory beside stock, and took no turns with it:"


def as_markdown(results: Sequence[CaseResult]) -> str:
    """All cases, one table each, then the profiles."""
    notes = [NOTES, *([IDLE] if any(result.profiles for result in results) else [])]
    return "\n\n".join([*(_case(result, results) for result in results), *notes])


def as_data(results: Sequence[CaseResult]) -> dict[str, Any]:
    """By case: sizes, ceilings in TFLOP/s, and by arm every step's time and all derived figures."""
    return {
        result.case.name: {
            "describe": result.case.describe(),
            "tokens_a_step": result.tokens,
            "useful_flops_a_step": result.flops,
            "ceilings_tflops": result.ceilings,
            "alone": result.alone,
            "arms": {name: asdict(m) | _derived(m, result) for name, m in result.arms.items()},
            "profiles": {name: asdict(found) for name, found in result.profiles.items()},
        }
        for result in results
    }


def _derived(measured: Measured, result: CaseResult) -> dict[str, float | None]:
    return {
        "step_seconds": measured.step_time,
        "times_stock": _ratio(measured, result),
        "tokens_per_second": measured.tokens_per_second,
        "useful_tflops": measured.tflops,
        "share_of_gemm_ceiling": measured.tflops / result.ceilings[measured.precision],
    }


def _ratio(measured: Measured, result: CaseResult) -> float | None:
    stock = result.arms.get(STOCK)
    time = measured.stock_time or (stock.step_time if stock else None)
    return time / measured.step_time if time else None


def _case(result: CaseResult, results: Sequence[CaseResult]) -> str:
    ceilings = ", ".join(
        f"{name} {'forward and backward' if name == 'attention' else 'GEMM'} {value:.4g}"
        for name, value in result.ceilings.items()
    )
    lines = [
        f"### {result.case.name}: {result.case.describe()}",
        "",
        f"{result.tokens:,.0f} tokens, {result.flops / 1e12:.4g} useful TFLOP a step; ceilings in TFLOP/s: {ceilings}",
    ]
    if result.alone:
        lines.append(f"{ALONE} {', '.join(result.alone)}")
    if result.case.name == MIXED and STOCK in result.arms:
        lines.append(STOCK_MIXED)
    lines += ["", table([HEAD, *(_row(name, m, result) for name, m in result.arms.items())])]
    if result.case.name == MIXED:
        lines += _share_of_full_rate(result, results)
    if result.profiles:
        lines += ["", profile_tables(result.profiles, {name: m.step_time for name, m in result.arms.items()})]
    return "\n".join(lines)


def _row(name: str, m: Measured, result: CaseResult) -> tuple[str, ...]:
    ratio = _ratio(m, result)
    return (
        name,
        *(f"{seconds * 1e3:.1f}" for seconds in (m.step_time, min(m.seconds), max(m.seconds))),
        "-" if ratio is None else f"{ratio:.2f}",
        f"{m.tokens_per_second:,.0f}",
        f"{m.tflops:.4g}",
        f"{m.tflops / result.ceilings[m.precision]:.1%} {m.precision}",
        *("-" if size is None else f"{size / GIB:.1f}" for size in (m.allocated, m.reserved)),
    )


def _share_of_full_rate(result: CaseResult, results: Sequence[CaseResult]) -> list[str]:
    full = {name: m for other in results if other.case.name == FULL_RATE for name, m in other.arms.items()}
    shares = [
        f"{name} {m.tokens_per_second / full[name].tokens_per_second:.1%}"
        for name, m in result.arms.items()
        if name in full
    ]
    return ["", f"tokens/s as a share of {FULL_RATE}'s: {', '.join(shares)}"] if shares else []


def profile_tables(profiles: Mapping[str, Profile], step_times: Mapping[str, float]) -> str:
    """Families, idle and span in ms a step, then each arm's longest kernels and gaps. step_times: seconds, of steps
    that were not profiled."""
    rows: list[tuple[str, ...]] = [("ms a step", *FAMILIES, "idle", "span", "idle share", "unprofiled")]
    for name, p in profiles.items():
        times = (*(p.families[family] for family in FAMILIES), p.idle, p.span)
        idle = max(0.0, 1 - (p.span - p.idle) / 1e3 / step_times[name])
        rows.append((name, *(f"{time:.2f}" for time in times), f"{p.idle / p.span:.1%}", f"{idle:.1%}"))
    parts = [table(rows)]
    for name, p in profiles.items():
        longest: list[tuple[str, ...]] = [("ms", "launches", "family", f"kernel of {name}")]
        longest += [(f"{ms:.2f}", f"{n:.0f}", family, kernel[:80]) for family, kernel, n, ms in p.kernels]
        parts.append(table(longest))
        gaps: list[tuple[str, ...]] = [("idle ms", "times", f"after, in {name}", "before")]
        gaps += [(f"{ms:.2f}", f"{n:.0f}", before[:50], after[:50]) for before, after, n, ms in p.gaps]
        parts.append(table(gaps))
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
