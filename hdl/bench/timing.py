"""The clock: arms take their steps in turn, each step timed from a synchronized GPU to a synchronized GPU.

Every arm first warms up by itself, longer where every step brings other sizes; then all take one step in turn that is not counted (the allocator was
emptied before it), then the counted ones: stock step 4, bf16 step 4, fp8 step 4, stock step 5, ... A
step's batches wait in page-locked host memory; their way to the GPU is part of the step.

Memory of one arm among several: the peak during its own step minus what the other arms hold between
theirs, which is known because what is allocated (and reserved, once the allocator's unused blocks are
given back) is compared before and after an arm is built and before and after it warms up. The reserved
peak is that of one extra step from an emptied allocator, because in the timed ones an arm reuses blocks
that another arm reserved.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, TypeVar

import torch

from hdl.bench.arms import Arm
from hdl.bench.cases import Case, packs, useful_flops
from hdl.data.batches import Batch
from hdl.memory.host import GIB
from hdl.o1.config import O1Config

MIXED_WARMUP = 5
UNTIMED = 1_000_000  # steps from there on are never timed
Say = Callable[[str], None]


class Closes(Protocol):
    def close(self) -> None: ...


A = TypeVar("A", bound=Closes)


@dataclass
class Measured:
    """One arm in one case: a number a timed step, and bytes at the peak (None without a GPU).

    precision: of the arm's products with its frozen weights. stock_time: seconds, the median of the stock arm
    that took turns with this one, if any."""

    precision: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    allocated: int | None = None
    reserved: int | None = None
    stock_time: float | None = None

    @property
    def step_time(self) -> float:
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return median(n / s for n, s in zip(self.tokens, self.seconds))

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s."""
        return median(f / s for f, s in zip(self.flops, self.seconds)) / 1e12


class Held:
    """How many bytes each arm holds on the device between its steps: (allocated, reserved)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_arm: dict[str, tuple[int, int]] = {}

    @contextmanager
    def by(self, arm: str) -> Iterator[None]:
        """What grows or shrinks in here is the arm's."""
        before = self._now()
        yield
        was, now = self.by_arm.get(arm, (0, 0)), self._now()
        self.by_arm[arm] = (was[0] + now[0] - before[0], was[1] + now[1] - before[1])

    def by_others(self, arm: str) -> tuple[int, int]:
        others = [held for name, held in self.by_arm.items() if name != arm]
        return sum(a for a, _ in others), sum(r for _, r in others)

    def _now(self) -> tuple[int, int]:
        if self.device.type != "cuda":
            return 0, 0
        give_back()
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)


@contextmanager
def built(
    names: Sequence[str], make: Callable[[str], A], device: torch.device, say: Say
) -> Iterator[tuple[list[A], Held]]:
    """The arms, all resident, and what each holds; their memory is free again afterwards."""
    held, arms = Held(device), list[A]()
    try:
        for name in names:
            with held.by(name):
                arms.append(make(name))
            allocated, _ = held.by_arm[name]
            say(f"built {name}" + (f", {allocated / GIB:.1f} GiB" if allocated else ""))
        yield arms, held
    finally:
        for arm in arms:
            arm.close()
        arms.clear()
        give_back()


def give_back() -> None:
    """Drop garbage, and return the allocator's unused blocks to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    case: Case, arms: Sequence[Arm], held: Held, config: O1Config, steps: int, warmup: int
) -> dict[str, Measured]:
    """Time `steps` steps of every arm."""
    measured = {arm.name: Measured(arm.precision) for arm in arms}
    for arm in arms:
        with held.by(arm.name):
            for number in _warm_up_steps(case, arm, warmup):
                arm.step(number, step_batches(case, [arm], config, number)[arm.name])
    for number in range(warmup, warmup + 1 + steps):
        batches = step_batches(case, arms, config, number)
        segments = case.segments(number)
        for arm in arms:
            others, _ = held.by_others(arm.name)
            seconds, loss, peak, _ = timed_step(arm, number, batches[arm.name])
            if number == warmup:
                continue
            found = measured[arm.name]
            found.seconds.append(seconds)
            found.losses.append(loss)
            found.tokens.append(sum(segment.tokens for segment in segments))
            found.flops.append(useful_flops(config, segments))
            if peak is not None:
                found.allocated = max(found.allocated or 0, peak - others)
    if held.device.type == "cuda":
        last = warmup + steps
        for arm in arms:
            batches = step_batches(case, [arm], config, last)
            give_back()
            _, others = held.by_others(arm.name)
            *_, reserved = timed_step(arm, last, batches[arm.name])
            measured[arm.name].reserved = (reserved or 0) - others
    return measured


def _warm_up_steps(case: Case, arm: Arm, warmup: int) -> list[int]:
    """Steps whose sizes are ever new take some to meet all that is prepared once a size (MIXED_WARMUP times
    `warmup`); the stock arm prepares nothing. None of them is a step that is timed."""
    more = (MIXED_WARMUP - 1) * warmup if case.mixed and arm.packs_sizes else 0
    return [*range(UNTIMED, UNTIMED + more), *range(warmup)]


def timed_step(
    arm: Arm, number: int, batches: Sequence[Batch]
) -> tuple[float, float, int | None, int | None]:
    """(seconds, loss, peak of allocated bytes, peak of reserved bytes) of one step."""
    on_gpu = arm.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(arm.device)
        torch.cuda.synchronize(arm.device)
    start = time.perf_counter()
    loss = arm.step(number, batches)
    if on_gpu:
        torch.cuda.synchronize(arm.device)
    seconds = time.perf_counter() - start
    if not on_gpu:
        return seconds, loss, None, None
    return (
        seconds,
        loss,
        torch.cuda.max_memory_allocated(arm.device),
        torch.cuda.max_memory_reserved(arm.device),
    )


def step_batches(case: Case, arms: Sequence[Arm], config: O1Config, number: int) -> Mapping[str, list[Batch]]:
    """What each arm trains on in this step, by name: the same samples, packed as the arm takes them."""
    samples = case.samples(number, config.hidden_size)
    return {
        arm.name: packs(samples, together=arm.packs_sizes or not case.mixed, pin=arm.device.type == "cuda")
        for arm in arms
    }
