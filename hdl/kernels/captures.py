"""The CUDA graphs that stand in for a decoder's passes, of training or of drawing, and the memory that they share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from hdl.errors import ran_out_of_memory

C = TypeVar("C")


class Captures(Generic[C]):
    """captured: what there is, least recently used first."""

    def __init__(self, enabled: bool) -> None:
        self.captured: list[C] = []
        self._enabled = enabled
        self._memory: Any = None

    def pool(self) -> Any:
        """Of memory, for all captures."""
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        return self._memory

    def drop(self) -> bool:
        """Give the graphs' memory back; whether there was any."""
        held = bool(self.captured)
        if held and torch.cuda.is_available():
            torch.cuda.synchronize()  # a replay may be under way, and unmapping waits for the capture's stream alone
        self.captured.clear()
        self._memory = None
        torch.cuda.empty_cache()
        return held

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take plain passes in here: a profile sees who launched what. Graphs are captured anew afterwards."""
        self.drop()
        enabled, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = enabled

    def with_room(self, capture: Callable[[], C]) -> C | None:
        """What it captures, with the memory of the others if need be; None, and no more tries, where that is not enough."""
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        while True:
            try:
                return capture()
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                if (
                    stream
                ):  # one that breaks off as it ends stays on its own, where nothing waits for the others
                    torch.cuda.set_stream(stream)
                if self.drop():
                    continue  # with the memory of the others
                self._enabled = False  # what graphs hold between steps is not there for anything else
                print("not enough memory for CUDA graphs: small steps stay bound by the CPU")
                return None
