from collections.abc import Sequence
from pathlib import Path
from time import sleep

import pytest
import torch

from hdl.bench.cases import all_cases, useful_flops
from hdl.bench.timing import UNTIMED, Held, Measured, measure
from hdl.data.batches import Batch
from hdl.o1.config import read_config

CPU = torch.device("cpu")


class Fake:
    """Sleeps instead of training, and writes down what it was asked."""

    precision, device = "fp32", CPU

    def __init__(self, name: str, seconds: float, packs_sizes: bool, diary: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.packs_sizes, self.diary = name, seconds, packs_sizes, diary
        self.batches: list[Sequence[Batch]] = []

    def step(self, number: int, batches: Sequence[Batch]) -> float:
        self.diary.append((self.name, number))
        self.batches.append(batches)
        sleep(self.seconds)
        return float(number)


def test_arms_warm_up_alone_and_then_take_turns(tiny_base: Path) -> None:
    config = read_config(tiny_base / "config.json")
    case = all_cases(tiny=True)["mixed"]
    diary: list[tuple[str, int]] = []
    slow, quick = Fake("slow", 0.02, False, diary), Fake("quick", 0.0, True, diary)
    found = measure(case, [slow, quick], Held(CPU), config, steps=5, warmup=2)  # type: ignore[list-item]
    more = [("quick", n) for n in range(UNTIMED, UNTIMED + 4 * 2)]  # it packs sizes, and they change
    warm = [("slow", 0), ("slow", 1), *more, ("quick", 0), ("quick", 1)]
    assert diary == warm + [(name, n) for n in range(2, 8) for name in ("slow", "quick")]
    assert found["slow"].losses == [3.0, 4.0, 5.0, 6.0, 7.0], "the first in turn is not counted"
    assert all(0.02 <= s < 0.2 for s in found["slow"].seconds) and found["quick"].step_time < 0.02
    assert [len(b) for b in slow.batches] == [4] * 8 and [len(b) for b in quick.batches] == [1] * 16
    for i, number in enumerate(range(3, 8)):
        assert found["slow"].tokens[i] == sum(s.tokens for s in case.segments(number))
        assert found["quick"].flops[i] == useful_flops(config, case.segments(number))
    assert found["slow"].allocated is None and found["slow"].reserved is None


def test_rates_are_medians_over_steps() -> None:
    measured = Measured("bf16", [0.1, 0.2, 9.0], [100, 300, 100], [1e12, 1e12, 1e12])
    assert measured.step_time == 0.2
    assert measured.tokens_per_second == 1000
    assert measured.tflops == pytest.approx(5.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's allocator")
def test_memory_is_told_apart_between_arms() -> None:
    held = Held(torch.device("cuda"))
    with held.by("a"):
        kept = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda")]
    with held.by("b"):
        kept.append(torch.empty(16 << 20, dtype=torch.uint8, device="cuda"))
        del kept[0]
    assert held.by_others("b") == (64 << 20, 64 << 20)
    assert held.by_arm["b"] == (-48 << 20, -48 << 20)
