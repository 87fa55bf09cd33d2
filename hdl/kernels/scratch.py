"""One piece of memory that the linears of a decoder fill each in its turn, all on one stream."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """To be reserved by all who will take it before the first does: it stays where it is, as what a CUDA graph
    replays expects."""

    def __init__(self) -> None:
        self._bytes = 0
        self._memory: Tensor | None = None

    def reserve(self, size: int) -> None:
        """size: bytes that somebody will take at once."""
        assert self._memory is None, "taken before all have reserved what they need"
        self._bytes = max(self._bytes, size)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Contiguous, not initialised; whoever took it before has lost it."""
        if self._memory is None:
            self._memory = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        needed = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[:needed].view(dtype).view(shape)
