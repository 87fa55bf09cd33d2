"""The drawing benchmark: every case with all arms in turn, step by step, from a synchronized GPU to a synchronized GPU.

Each arm begins a case by itself (its prompts are read, kernels compiled, graphs captured), then all take one uncounted
step in turn, then the counted ones. Afterwards each of ours reads the prompts `READS` times more, which is timed, and
takes steps that read the text every time: what reading it once gains. Memory of one arm is its peak minus what the
others hold; it is taken over a whole beginning, from an emptied allocator, with reading, a plain step, a capture and
replays.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from hdl.bench.draw_arms import STEPS, STOCK, DrawArm, DrawCase, DrawSetup
from hdl.bench.profile import Profile, record_kernels, summarize
from hdl.bench.report import GIB, profile_tables, table
from hdl.bench.timing import Held, Say, built, give_back

READS = 3
PROFILED_STEPS = 3
HEAD = (
    "arm", "step ms", "min", "max", "x stock", "reading ms", f"s a {STEPS} steps", "x stock", "text in every step ms",
    "gain", "alloc. GiB", "reserved GiB", "off stock",
)  # fmt: skip
NOTES = f"""\
step: the sampler's whole step, both branches of all pictures; s a {STEPS} steps: reading and that many of the median.
text in every step: the same decoder without kept keys and values. GiB: peaks of the arm's own beginning (reading, a
plain step, capture, replays), less what the other arms hold. off stock: relative distance of the first x_pred."""


@dataclass
class DrawMeasured:
    """One arm in one case: seconds of each step, each reading of the prompts, each step that reads the text too; bytes
    at the peak (None without a GPU); how far its first x_pred is from stock's, of its norm."""

    seconds: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    allocated: int | None = None
    reserved: int | None = None
    off: float | None = None

    @property
    def step_time(self) -> float:
        return median(self.seconds)

    @property
    def picture_time(self) -> float:
        """Seconds of all STEPS with the reading before them."""
        return STEPS * self.step_time + (median(self.reading) if self.reading else 0.0)

    @property
    def gain(self) -> float | None:
        """Of reading the text once: time of all steps with the text in each, of that without."""
        return STEPS * median(self.whole) / self.picture_time if self.whole else None


@dataclass
class DrawResult:
    case: DrawCase
    arms: dict[str, DrawMeasured]
    profiles: dict[str, Profile] = field(default_factory=dict)

    def times_stock(self, name: str, of: Callable[[DrawMeasured], float]) -> float | None:
        return of(self.arms[STOCK]) / of(self.arms[name]) if STOCK in self.arms else None


def run_draw_cases(
    cases: Sequence[DrawCase], names: Sequence[str], setup: DrawSetup,
    *, steps: int, warmup: int, profiled: bool, say: Say,
) -> list[DrawResult]:  # fmt: skip
    """Measure every case with all arms, which are resident together."""
    with built(names, lambda name: DrawArm(name, setup), setup.device, say) as (arms, held):
        return [_measure(case, arms, held, steps, warmup, profiled, say) for case in cases]


def _measure(
    case: DrawCase, arms: Sequence[DrawArm], held: Held, steps: int, warmup: int, profiled: bool, say: Say
) -> DrawResult:
    result = DrawResult(case, {arm.name: DrawMeasured() for arm in arms})
    for arm in arms:
        with held.by(arm.name):
            _begin(arm, case, warmup)
    _compare(arms, result)
    for number in range(steps + 1):
        for arm in arms:
            seconds = _timed(arm, arm.step)
            if number:
                result.arms[arm.name].seconds.append(seconds)
    for arm in arms:
        with held.by(arm.name):  # in the end, its weights alone
            _measure_apart(arm, result, held, steps, profiled)
    times = ", ".join(f"{name} {found.step_time * 1e3:.1f} ms" for name, found in result.arms.items())
    say(f"{case.name}: {times}")
    return result


def _measure_apart(arm: DrawArm, result: DrawResult, held: Held, steps: int, profiled: bool) -> None:
    """What takes no turns with the other arms."""
    case, found = result.case, result.arms[arm.name]
    arm.end()
    arm.forget_graphs()
    found.allocated, found.reserved = _peaks(arm, case, held)
    if arm.name != STOCK:
        found.reading = [_timed(arm, arm.read) for _ in range(READS)]
        arm.read(once=False)
        arm.step()  # kernels for these sizes
        found.whole = [_timed(arm, arm.step) for _ in range(steps)]
        if profiled:
            result.profiles[arm.name] = _profile(arm, case)
    arm.end()
    arm.forget_graphs()


def _begin(arm: DrawArm, case: DrawCase, steps: int) -> None:
    arm.begin(case)
    for _ in range(steps):
        arm.step()


def _compare(arms: Sequence[DrawArm], result: DrawResult) -> None:
    """At the same z: stock's."""
    stock = next((arm for arm in arms if arm.name == STOCK), None)
    if stock is None:
        return
    expected = stock.predict()
    for arm in arms:
        if arm is not stock:
            own, arm.z = arm.z, stock.z
            result.arms[arm.name].off = float((arm.predict() - expected).norm() / expected.norm())
            arm.z = own


def _timed(arm: DrawArm, run: Callable[[], None]) -> float:
    _settle(arm)
    start = time.perf_counter()
    run()
    _settle(arm)
    return time.perf_counter() - start


def _settle(arm: DrawArm) -> None:
    if arm.device.type == "cuda":
        torch.cuda.synchronize(arm.device)


def _peaks(arm: DrawArm, case: DrawCase, held: Held) -> tuple[int | None, int | None]:
    """Bytes allocated and reserved at most."""
    if arm.device.type != "cuda":
        _begin(arm, case, 1)
        return None, None
    give_back()
    others = held.by_others(arm.name)
    torch.cuda.reset_peak_memory_stats(arm.device)
    _begin(arm, case, 3)
    _settle(arm)
    peaks = torch.cuda.max_memory_allocated(arm.device), torch.cuda.max_memory_reserved(arm.device)
    return peaks[0] - others[0], peaks[1] - others[1]


def _profile(arm: DrawArm, case: DrawCase) -> Profile:
    def steps() -> None:
        for _ in range(PROFILED_STEPS):
            arm.step()

    _begin(arm, case, 3)
    timeline = record_kernels(steps)
    with arm.without_graphs():
        steps()
        annotated = record_kernels(steps, annotated=True)
    return summarize(timeline, annotated, PROFILED_STEPS)


def as_markdown(results: Sequence[DrawResult]) -> str:
    """A table a case, then profiles."""
    parts = []
    for result in results:
        parts.append(f"### {result.case.name}: {result.case.describe()}")
        parts.append(table([HEAD, *(_row(name, result) for name in result.arms)]))
        if result.profiles:
            times = {name: found.step_time for name, found in result.arms.items()}
            parts.append(profile_tables(result.profiles, times))
    return "\n\n".join([*parts, NOTES])


def as_data(results: Sequence[DrawResult]) -> dict[str, Any]:
    """By case and arm: every time, and what follows from them."""
    return {
        result.case.name: {
            "describe": result.case.describe(),
            "arms": {name: asdict(found) | _derived(name, result) for name, found in result.arms.items()},
            "profiles": {name: asdict(found) for name, found in result.profiles.items()},
        }
        for result in results
    }


def _derived(name: str, result: DrawResult) -> dict[str, float | None]:
    found = result.arms[name]
    return {
        "step_seconds": found.step_time,
        "step_times_stock": result.times_stock(name, lambda m: m.step_time),
        "picture_seconds": found.picture_time,
        "picture_times_stock": result.times_stock(name, lambda m: m.picture_time),
        "gain_of_reading_once": found.gain,
    }


def _row(name: str, result: DrawResult) -> tuple[str, ...]:
    found, derived = result.arms[name], _derived(name, result)

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def ms(times: Sequence[float]) -> str:
        return number(median(times) * 1e3 if times else None, ".1f")

    return (
        name,
        *(f"{seconds * 1e3:.1f}" for seconds in (found.step_time, min(found.seconds), max(found.seconds))),
        number(derived["step_times_stock"], ".2f"),
        ms(found.reading),
        f"{found.picture_time:.2f}",
        number(derived["picture_times_stock"], ".2f"),
        ms(found.whole),
        number(found.gain, ".3f"),
        *("-" if size is None else f"{size / GIB:.2f}" for size in (found.allocated, found.reserved)),
        number(found.off, ".1e"),
    )
