"""The model of a step on several GPUs: against what two took, and against what must hold of any."""

import re
from pathlib import Path

import pytest

from hdl.bench import scaling
from hdl.bench.scaling import Cluster, latest_of, step
from hdl.memory.plan import GPUS, Strategy, Work
from hdl.o1.config import read_config
from hdl.o1.layout import Segment

REPOSITORY = Path(__file__).parents[2]
REAL = read_config(REPOSITORY / "tests/o1/o1-8b-config.json")
H100 = GPUS["h100"]
# launch/random_8b.sh's four images of about 1,250 tokens, see docs/measurements.md.
LOOP = Work.of([Segment(226, 32, 32)] * 4)
# Weights, GPUs, images a second: two H100 of one host, 2026-11-25.
MEASURED = [("full", 1, 14.08), ("full", 2, 27.6), ("fp8", 2, 39.8)]
# launch/bench_8gpu.sh's; and of weights, GPUs, layers that are shared out, ms a step: four H100 of one host, 2026-11-26.
BENCH = Work.of_images(1024, 1024, 4, 160)
STEPS = [
    ("full", 1, 0, 269.8), ("full", 2, 0, 279.6), ("full", 4, 0, 280.3), ("full", 2, 36, 309.5), ("full", 4, 36, 315.1),
    ("fp8", 1, 0, 187.1), ("fp8", 2, 0, 190.9), ("fp8", 4, 0, 193.0), ("fp8", 2, 36, 216.0), ("fp8", 4, 36, 218.8),
]  # fmt: skip


def strategy(weights: str, cluster: Cluster, shard: int = 0) -> Strategy:
    return Strategy(weights, ("everything",) * 36, world=cluster.world, shard=shard, neighbours=cluster.gpus)


@pytest.mark.parametrize(("weights", "gpus", "images"), MEASURED)
def test_agrees_with_one_and_two_gpus(weights: str, gpus: int, images: float) -> None:
    cluster = Cluster(gpus)
    best, worst = step(REAL, 32, LOOP, strategy(weights, cluster), cluster, H100).ms
    assert best == worst  # waiting is that of two
    assert gpus * 4e3 / best == pytest.approx(images, rel=0.05)


@pytest.mark.parametrize(("weights", "gpus", "shard", "measured"), STEPS)
def test_agrees_with_steps_of_up_to_four_gpus(weights: str, gpus: int, shard: int, measured: float) -> None:
    cluster = Cluster(gpus)
    best, worst = step(REAL, 32, BENCH, strategy(weights, cluster, shard), cluster, H100).ms
    assert 0.965 * measured < worst and best < 1.035 * measured


def test_a_gather_shows_as_far_as_it_takes_longer_than_a_layer() -> None:
    fast, slow = Cluster(8, nvlink=1000.0), Cluster(8, nvlink=50.0)
    hidden, seen = (step(REAL, 32, LOOP, strategy("full", c, 36), c, H100) for c in (fast, slow))
    assert hidden.visible == 0 < hidden.gathered and 0 < seen.visible < seen.gathered
    halved = step(REAL, 32, LOOP, strategy("fp8", slow, 36), slow, H100)
    assert halved.gathered == pytest.approx(seen.gathered / 2, rel=0.02)
    assert step(REAL, 32, LOOP, strategy("full", slow, 2), slow, H100).gathered == 0


def test_what_goes_over_the_wires() -> None:
    """The adapter's gradient and values, and of the weights nothing, unless they were shared out across machines."""
    fast, slow = Cluster(8, 4, wire=400), Cluster(8, 4, wire=100)
    shared = [step(REAL, 32, LOOP, strategy("full", c, 36), c, H100) for c in (fast, slow)]
    assert shared[0].gathered == shared[1].gathered
    assert 3 < shared[1].gradient / shared[0].gradient < 4
    for cluster in (fast, slow):
        across = step(REAL, 32, LOOP, strategy("full", cluster, 36), cluster, H100, across=True)
        assert across.gathered > across.computed, "as hdl/memory/shares.py says"
    assert step(REAL, 32, LOOP, strategy("full", Cluster(1)), Cluster(1), H100).gradient == 0


def test_waiting_for_the_latest() -> None:
    assert latest_of(1) == pytest.approx(0, abs=1e-6)
    assert latest_of(2) == pytest.approx(0.5642, abs=1e-3)  # 1 / sqrt(pi)
    assert latest_of(32) == pytest.approx(2.07, abs=0.01)
    assert scaling.waiting_ms(2) == pytest.approx((scaling.WAITING,) * 2)


def test_the_page_has_the_numbers_of_today() -> None:
    """docs/scaling.md shows what tools/scaling.py prints, to 5 %."""
    page = (REPOSITORY / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    work = Work.of_images(1024, 1024, 4, 160)
    for line in scaling.table(REAL, 32, work, 4, H100, scaling.clusters())[2:]:
        row = "|".join(line.split("|")[:3])
        [shown] = [there for there in page if there.startswith(row + "|")]
        advice = f"run tools/scaling.py and put its table into docs/scaling.md: {line}"
        assert numbers(shown[len(row) :]) == pytest.approx(numbers(line[len(row) :]), rel=0.05, abs=0.2), (
            advice
        )


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text)]
