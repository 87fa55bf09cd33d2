"""Bring the adapter's current values into the packed matrices: every A, and every B times its scaling.

The optimizer owns PEFT's parameters; the packed matrices hold copies, refreshed before each forward pass.
The real model has 504 such blocks; copied one by one their launches alone would take milliseconds, so one
kernel copies them all, from a table of where each block is and goes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from hdl.kernels.backend import runs_triton

CHUNK = 4096  # elements one program copies


@dataclass(frozen=True)
class Block:
    """source [rows, columns], contiguous; target, of the same shape, may be a block of a larger matrix.

    module: PEFT's linear, asked for its scaling and whether its adapter is switched off. scaled: a B, which
    is multiplied with the scaling, and zero while the adapter is off."""

    source: nn.Parameter
    target: Tensor
    module: nn.Module
    scaled: bool

    @property
    def factor(self) -> float:
        if not self.scaled:
            return 1.0
        return 0.0 if self.module.disable_adapters else self.module.scaling["default"]  # type: ignore[index,return-value]


class AdapterCopies:
    """All blocks of a model, on one device."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._known: tuple[tuple[int, float], ...] | None = None
        self._addresses = self._factors = torch.empty(0)
        if blocks:
            # Pointers in the table are typed by the kernel, once for all blocks.
            self._shapes = torch.tensor([[*b.target.shape, b.target.stride(0)] for b in blocks])
            self._chunks = max(-(-b.target.numel() // CHUNK) for b in blocks)

    def refresh(self) -> None:
        if not self.blocks:
            return
        if not runs_triton(self.blocks[0].target) or not self._uniform():
            for block in self.blocks:
                block.target.copy_(block.source.detach() * block.factor)
            return
        self._refresh_table()
        first = self.blocks[0]
        with torch.cuda.device_of(first.target):
            _copy_blocks[(len(self.blocks), self._chunks)](
                self._addresses, self._factors, self._shapes, first.source.detach(), first.target, CHUNK=CHUNK
            )

    def _uniform(self) -> bool:
        """One kernel reads one dtype, and contiguous sources."""
        dtype = self.blocks[0].source.dtype
        return all(b.source.dtype == dtype and b.source.is_contiguous() for b in self.blocks)

    def _refresh_table(self) -> None:
        known = tuple((b.source.data_ptr(), b.factor) for b in self.blocks)
        if known == self._known:
            return
        device = self.blocks[0].target.device
        self._addresses = torch.tensor(
            [[source, b.target.data_ptr()] for (source, _), b in zip(known, self.blocks)], device=device
        )
        self._factors = torch.tensor([factor for _, factor in known], dtype=torch.float32, device=device)
        self._shapes = self._shapes.to(device)
        self._known = known


@triton.jit
def _copy_blocks(
    addresses: tl.tensor,
    factors: tl.tensor,
    shapes: tl.tensor,
    like_source: tl.tensor,
    like_target: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    rows = tl.load(shapes + block * 3)
    columns = tl.load(shapes + block * 3 + 1)
    stride = tl.load(shapes + block * 3 + 2)
    element = tl.program_id(1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = element < rows * columns
    source = tl.load(addresses + block * 2).to(like_source.dtype)
    target = tl.load(addresses + block * 2 + 1).to(like_target.dtype)
    values = tl.load(source + element, mask=inside).to(tl.float32) * tl.load(factors + block)
    place = element // columns * stride + element % columns
    tl.store(target + place, values.to(target.dtype.element_ty), mask=inside)
