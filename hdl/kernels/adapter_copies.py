"""Bring the adapter's current values into the packed matrices: every A, and every B times its scaling.

The optimizer owns PEFT's parameters; the packed matrices hold copies, refreshed before each forward pass, and
fp8 weights what the copies come to in e4m3 (hdl/kernels/folded.py). The real model has 504 such blocks; copied
one by one their launches alone would take milliseconds, so those with as many columns are copied together,
from a table of where each block is and goes. A table is made only when the adapter has moved or its factors
changed, which a few numbers tell: parameters that are trained are views of one flat one, so they move as a whole,
and those that are only drawn with stay where they are. The last two are kept: an adapter that is trained may be
off every other time (hdl/flow/step.py's base_prediction).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton
from hdl.kernels.folded import Folds
from hdl.kernels.linears import Block, PackedLinear

CHUNK = 4096  # elements one program copies
TABLES = 2


class AdapterCopies:
    """All blocks of a model's linears, on one device."""

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.blocks = [block for linear in linears for block in linear.copies()]
        self.folds = Folds([fold for linear in linears for fold in linear.folds()])
        self._loras = [b.lora for b in self.blocks if b.scaled]
        self._tables: dict[object, list[_Group]] = {}  # the last used last

    def refresh(self) -> None:
        if not self.blocks:
            return
        groups = self._groups() if runs_triton(self.blocks[0].target) else []
        if not groups:
            for block in self.blocks:
                block.target.copy_(block.source.detach().float() * _factor(block))
        else:
            like = (self.blocks[0].source.detach(), self.blocks[0].target)
            with torch.cuda.device_of(like[1]):
                for g in groups:
                    _copy_blocks[(len(g.programs),)](
                        g.table, g.factors, g.programs, *like, FIELDS, g.columns, g.aligned, CHUNK
                    )
        self.folds.refresh()

    def _groups(self) -> list["_Group"]:
        """What the kernel copies; nothing where it cannot: it reads contiguous sources, all of one dtype."""
        first, last = self.blocks[0].source, self.blocks[-1].source
        known = (first.data_ptr(), last.data_ptr(), first.dtype, tuple(lora.factor for lora in self._loras))
        groups = self._tables.pop(known, None)
        if groups is None:
            uniform = all(b.source.dtype == first.dtype and b.source.is_contiguous() for b in self.blocks)
            groups = _grouped(self.blocks) if uniform else []
        self._tables = dict([*self._tables.items()][-TABLES + 1 :]) | {known: groups}
        return groups


def _factor(block: Block) -> float:
    return block.lora.factor if block.scaled else 1.0


@dataclass(frozen=True)
class _Group:
    """Blocks with the same number of columns, on their device: one launch.

    table: int64 [blocks, FIELDS], addresses of source and target, elements, the target's row stride;
    factors: float32 [blocks]; programs: int32 [programs, 2], which block and which of its chunks;
    aligned: whether every address and stride is a multiple of 16 bytes.
    """

    columns: int
    aligned: bool
    table: Tensor
    factors: Tensor
    programs: Tensor


FIELDS = 4


def _grouped(blocks: Sequence[Block]) -> list[_Group]:
    by_kind: dict[tuple[int, bool], list[Block]] = {}
    for block in blocks:
        by_kind.setdefault((block.target.shape[1], _aligned(block)), []).append(block)
    return [_group(columns, aligned, group) for (columns, aligned), group in by_kind.items()]


def _aligned(block: Block) -> bool:
    source, target = block.source, block.target
    stride = target.stride(0) * target.element_size()
    return (source.data_ptr() | target.data_ptr() | stride) % 16 == 0


def _group(columns: int, aligned: bool, blocks: Sequence[Block]) -> _Group:
    device = blocks[0].target.device
    table = [(b.source.data_ptr(), b.target.data_ptr(), b.target.numel(), b.target.stride(0)) for b in blocks]
    chunks = [(i, c) for i, b in enumerate(blocks) for c in range(triton.cdiv(b.target.numel(), CHUNK))]
    return _Group(
        columns,
        aligned,
        torch.tensor(table, device=device),
        torch.tensor([_factor(b) for b in blocks], dtype=torch.float32, device=device),
        torch.tensor(chunks, dtype=torch.int32, device=device),
    )


@triton.jit
def _copy_blocks(
    table: tl.tensor,
    factors: tl.tensor,
    programs: tl.tensor,
    like_source: tl.tensor,  # the table's pointers are typed here, once for all blocks
    like_target: tl.tensor,
    FIELDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    block = tl.load(programs + tl.program_id(0) * 2)
    chunk = tl.load(programs + tl.program_id(0) * 2 + 1)
    table += block * FIELDS
    source = tl.load(table).to(like_source.dtype)
    target = tl.load(table + 1).to(like_target.dtype)
    elements = tl.load(table + 2).to(tl.int32)
    stride = tl.load(table + 3)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        stride = tl.multiple_of(stride, 16 // (like_target.dtype.element_ty.primitive_bitwidth // 8))
    # What else the columns divide by is known from COLUMNS: elements, a multiple of it, says nothing more.
    elements = tl.multiple_of(elements, COLUMNS & -COLUMNS)
    element = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = element < elements
    values = tl.load(source + element, mask=inside).to(tl.float32) * tl.load(factors + block)
    place = (element // COLUMNS).to(tl.int64) * stride + element % COLUMNS
    tl.store(target + place, values.to(target.dtype.element_ty), mask=inside)
