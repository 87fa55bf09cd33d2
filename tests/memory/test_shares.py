"""Layers that are shared out over the ranks of a machine: what each holds, and that nothing else changes."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hdl.kernels.fuse import fuse
from hdl.memory.plan import Strategy, Work, need
from hdl.memory.streaming import Streaming, Way
from tests.kernels.test_fused import adapted_model
from tests.memory.sharing_ranks import CONFIG, checks
from tests.memory.test_plan import REAL
from tests.memory.test_streaming import Decoder, Graph

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """Ranks that have made all checks."""

    folder: Path
    printed: str

    def assert_passed(self, check: str, world: int) -> None:
        for rank in range(world):
            result = self.folder / f"{rank} {check}"
            assert result.exists(), f"rank {rank} did not come to it: {self.printed}"
            assert result.read_text() == "passed"


@pytest.fixture(scope="module", params=[2, 3])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> tuple[int, Ended]:
    """So many of them; three do not divide the layers, nor a block's bytes."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.memory.sharing_ranks", str(rank), str(world), str(folder), str(tiny_base)],
            cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        for rank in range(world)
    ]  # fmt: skip
    return world, Ended(folder, "".join(rank.communicate(timeout=500)[0] for rank in started))


@pytest.mark.parametrize("check", list(checks("")))
def test_ranks(ranks: tuple[int, Ended], check: str) -> None:
    world, ended = ranks
    ended.assert_passed(check, world)


class Fetching(Decoder):
    """Layers whose fetches no graph may hold: each pass is written down as graphs with fetches in between."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.streaming._store.in_graphs, self.streaming.together = False, True  # type: ignore[misc]

    def between(self, work: Callable[[], object]) -> None:
        """As hdl.kernels.pieces.Pieces, with one Graph for all of a pass."""
        assert self.graph
        self.graph.work.append(work)

    def capture(self) -> dict[Way, Graph]:
        graphs: dict[Way, Graph] = {"forward": Graph(), "backward": Graph()}
        with self.streaming.recording():
            for way, self.graph in graphs.items():
                with self.streaming.joined(self.between):
                    self.visits(way)
            self.graph = None
        return graphs


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_fetches_between_graphs_find_and_leave_the_slots_right(count: int) -> None:
    decoder = Fetching(count)
    decoder.visits("forward")
    graphs = decoder.capture()
    assert sum(len(graph.work) for graph in graphs.values()) == 2 * count + 2 * max(2 * count - 4, 0)

    def replay(way: Way) -> None:
        with decoder.streaming.replaying(way):
            graphs[way].replay()

    for passes in (
        ["forward", "backward"],
        ["forward only", "forward", "backward"],
        ["forward", "forward", "backward"],
    ):
        for name in passes:
            decoder.visits("forward only") if name == "forward only" else replay(name)  # type: ignore[arg-type]
    with decoder.streaming.visits(0)("alone"):
        pass  # fetches nothing: the others do not take part


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_pass_that_broke_off_is_finished(count: int, way: Way) -> None:
    """Wherever it was, the same is fetched as in a whole pass, and the slots are left as one leaves them."""
    whole = fetched(count, way, None, inside=False)
    for broken in range(count):
        for inside in (False, True):
            assert fetched(count, way, broken, inside) == whole


def fetched(count: int, way: Way, broken: int | None, inside: bool) -> list[int]:
    """Which layers a pass fetches that breaks off at its n-th visit, or before, and is then finished."""
    decoder = Decoder(count)
    streaming: Streaming = decoder.streaming
    decoder.visits("forward")
    if way == "forward":
        decoder.visits("backward")
        streaming.prepare("backward")  # so that there is something to prepare
    log: list[int] = []
    fetch = streaming._fetch
    streaming._fetch = lambda j: (log.append(j), fetch(j))[1]  # type: ignore[method-assign]
    streaming.begin()
    streaming.prepare(way)
    order = streaming._order(way)
    for n, j in enumerate(order):
        if n == broken and not inside:
            break
        try:
            with streaming.visits(j)(way):
                if n == broken:
                    raise torch.OutOfMemoryError
        except torch.OutOfMemoryError:
            break
    streaming.finish(way)
    assert streaming.held == decoder_after(count, way)
    return log


def decoder_after(count: int, way: Way) -> list[int | None]:
    last = list(range(count))[-2:] if way == "forward" else list(range(count))[:2]
    return [next((j for j in last if j % 2 == slot), None) for slot in range(min(count, 2))]


def test_not_beside_other_places() -> None:
    for other in ({"stream": 2}, {"offload": 3}):
        with pytest.raises(ValueError, match="shard 2 beside"):
            fuse(adapted_model(CONFIG), shard=2, **other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard 6: expected 0 to 5"):
        fuse(adapted_model(CONFIG), shard=6)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@gpu
def test_pieces_replay_what_plain_passes_give() -> None:
    """On one GPU with a group of one: the order of gathers and graphs, and the slots, are those of many."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.memory.sharing_gpu"],
        cwd=REPOSITORY, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("weights", "share"), [("full", 0.57), ("fp8", 0.30)])
def test_the_plan_counts_shares_and_slots(weights: str, share: float) -> None:
    """Of what a GPU holds where every one has all weights; `need` is held to the tensors themselves in test_plan.py."""
    work = Work.of_images(1024, 1024, 4, 160)
    whole, shared = (
        need(REAL, 32, work, Strategy(weights, ("everything",) * 36, world=2, shard=shard, neighbours=2))
        for shard in (0, 36)
    )
    assert shared.weights / whole.weights == pytest.approx(share, abs=0.01)
    streamed = need(REAL, 32, work, Strategy(weights, ("everything",) * 36, world=2, stream=36))
    assert shared.weights - streamed.weights == streamed.weights_on_host // 2 and not shared.weights_on_host
