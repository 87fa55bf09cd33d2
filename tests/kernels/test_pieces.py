"""What is between two graphs is done between them, at every replay and not before."""

from types import TracebackType
from typing import Any

import pytest
import torch

from hdl.kernels.pieces import Pieces


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to graphs that are numbered in the order in which they are made."""
    log: list[str] = []

    class Graph:
        made = 0

        def __init__(self) -> None:
            Graph.made += 1
            self.number = Graph.made

        def replay(self) -> None:
            log.append(f"replay {self.number}")

    class Capture:
        def __init__(self, graph: Graph, **options: Any) -> None:
            self.graph = graph
            assert options == {"pool": "a pool"}

        def __enter__(self) -> None:
            log.append(f"begin {self.graph.number}")

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            log.append(f"end {self.graph.number}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    return log


def test_in_the_order_of_the_capture(events: list[str]) -> None:
    pieces = Pieces(pool="a pool")
    with pieces.capture():
        pieces.between(lambda: events.append("fetch"))
        pieces.between(lambda: events.append("wait"))
    assert events == ["begin 1", "end 1", "begin 2", "end 2", "begin 3", "end 3"]
    for _ in range(2):
        events.clear()
        pieces.replay()
        assert events == ["replay 1", "fetch", "replay 2", "wait", "replay 3"]


def test_a_pass_with_nothing_between_is_one_graph(events: list[str]) -> None:
    pieces = Pieces(pool="a pool")
    with pieces.capture():
        events.append("the pass")
    pieces.replay()
    assert events == ["begin 1", "the pass", "end 1", "replay 1"]


def test_a_capture_that_fails_is_ended(events: list[str]) -> None:
    pieces = Pieces(pool="a pool")
    with pytest.raises(torch.OutOfMemoryError), pieces.capture():
        pieces.between(lambda: None)
        raise torch.OutOfMemoryError
    assert events == ["begin 1", "end 1", "begin 2", "end 2"]
