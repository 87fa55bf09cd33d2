"""A pass captured as CUDA graphs in a row, with things between them that no graph may hold.

What is between is done by the host at every replay, in its place: queue a collective, let the stream wait for one.
Without any of it the pass is one graph. All graphs use one pool of memory, as they are replayed in the
order in which they were captured: what one leaves there the next ones find.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Pieces:
    """options: of torch.cuda.graph."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._parts: list[Callable[[], object]] = []
        self._open: torch.cuda.graph | None = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the pass."""
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The CUDA Graph is empty"
            )  # two things between may be neighbours
            self._begin()
            try:
                yield
            finally:
                self._end()

    def between(self, work: Callable[[], object]) -> None:
        """Let this be done here, at every replay; not now."""
        self._end()
        self._parts.append(work)
        self._begin()

    def replay(self) -> None:
        for part in self._parts:
            part()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, **self._options)
        capture.__enter__()
        self._open = capture
        self._parts.append(graph.replay)

    def _end(self) -> None:
        capture, self._open = self._open, None
        if capture:
            capture.__exit__(*sys.exc_info())
