"""Frozen linears that share their input, as one matrix product with their LoRA folded in.

q, k and v read the same activation, so do gate and up: their weights stand under one another in one
matrix W [N, K], and PEFT's modules see their rows of it (weights are stored once). With the A of all
members stacked, A [R, K], and their scaled B on the diagonal, sB [N, R], the layer is

    y = x W^T + (x A^T) sB^T        dx = dy W + (dy sB) A

bfloat16: both are single products over a longer inner dimension, y = [x, xA^T] [W, sB]^T and
dx = [dy, dy sB] [W; A]. Everything lives in one matrix [N + R, K + R], and activations live in buffers
R columns wider than they are, whose last columns (`low`) take the small product:

         K    R
    N  [ W   sB ]        forward reads the upper rows, backward the left columns
    R  [ A    0 ]

fp8: W is e4m3 with one scale an output channel. Forward takes it as it is; backward needs the values
transposed, because Hopper's fp8 units read both operands along the inner dimension, and there the scales lie
along the inner dimension too, so they are multiplied into dy before it is quantized. The LoRA side is folded
in likewise: E columns more hold its bfloat16 numbers as sums of two e4m3 numbers (hdl/kernels/folded.py),
in the weights since the last refresh of the adapter, in an activation's `wide_rows` once `low` is known.

Forms that are only kept, and brought back for each product, are in hdl/kernels/restored.py.

R is the sum of the ranks of the members' adapters, those that are off included, rounded up to 8 so that rows
stay aligned; the padding is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hdl.kernels.backend import named
from hdl.kernels.folded import Fold, fold_low, folded_width
from hdl.kernels.gemm import product, product_rows_fp8, product_transposed
from hdl.kernels.quantize import Rowwise, empty_rows, quantize_weight
from hdl.kernels.scratch import Scratch
from hdl.kernels.transpose import transpose
from hdl.memory.absent import put_in_place, take_out, weight_of
from hdl.memory.cache import fill

if TYPE_CHECKING:  # eight seconds, and tools/plan.py has no use for it
    from peft.tuners.lora import Linear as LoraLinear

ALIGNMENT = 8  # elements: 16 bytes of bfloat16


@dataclass(frozen=True)
class Buffer:
    """An activation or gradient [S, width] on its way into a product.

    wide [S, width + R]: the values in the first columns, `low`, their product with A or sB, in the last.
    wide_rows [S, width + E]: both once more in e4m3, for an fp8 product; None where there is none.
    """

    wide: Tensor
    width: int
    wide_rows: Rowwise | None

    @property
    def values(self) -> Tensor:
        return self.wide[:, : self.width]

    @property
    def low(self) -> Tensor:
        return self.wide[:, self.width :]

    @property
    def rows(self) -> Rowwise | None:
        """The values in e4m3, without the columns of `low`."""
        return None if self.wide_rows is None else self.wide_rows.columns(0, self.width)


@dataclass(frozen=True)
class Lora:
    """One adapter of PEFT's linear: one to train, or any number side by side to draw with."""

    module: "LoraLinear"
    name: str
    ranks: slice  # its columns of the pack's rank dimension

    @property
    def a(self) -> nn.Parameter:
        return self.module.lora_A[self.name].weight  # type: ignore[return-value]

    @property
    def b(self) -> nn.Parameter:
        return self.module.lora_B[self.name].weight  # type: ignore[return-value]

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.name]

    @property
    def factor(self) -> float:
        """What B is multiplied with at present: the scaling, or 0 while the adapter is off."""
        off = self.module.disable_adapters or self.name not in self.module.active_adapters
        return 0.0 if off else self.scaling


@dataclass(frozen=True)
class Member:
    """One linear of the pack: its rows of W, and its adapters."""

    module: nn.Module  # nn.Linear, or PEFT's around it
    rows: slice
    loras: tuple[Lora, ...]


@dataclass(frozen=True)
class Block:
    """What is to be copied from an adapter before a forward pass.

    source [rows, columns]; target, of the same shape, may be a block of a larger matrix. lora: whose it is.
    scaled: a B, which is multiplied with the adapter's factor.
    """

    source: nn.Parameter
    target: Tensor
    lora: Lora
    scaled: bool


class PackedLinear:
    """Base of both formats: the members, and the LoRA side in A [R, K] and sB [N, R]."""

    a: Tensor
    b: Tensor

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.members = _members(modules)
        self.n = self.members[-1].rows.stop
        self.k = base_of(modules[0]).weight.shape[1]
        self.ranks = sum(len(lora.a) for m in self.members for lora in m.loras)
        self.r = padded_rank(self.ranks)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters in the order of `adapter_gradients`."""
        return adapter_order([m.module for m in self.members])

    def copies(self) -> list[Block]:
        """What must be copied here from the adapter before a forward pass."""
        return [
            block
            for m in self.members
            for lora in m.loras
            for block in (
                Block(lora.a, self.a[lora.ranks], lora, scaled=False),
                Block(lora.b, self.b[m.rows, lora.ranks], lora, scaled=True),
            )
        ]

    def folds(self) -> list[Fold]:
        """What must be folded into e4m3 weights after that."""
        return []

    def input_buffer(self, tokens: int) -> Buffer:
        """Where the activation that this linear reads is to be written."""
        return self._buffer(tokens, self.k)

    def gradient_buffer(self, tokens: int) -> Buffer:
        """Where the gradient of this linear's output is to be written."""
        return self._buffer(tokens, self.n)

    def _buffer(self, tokens: int, width: int) -> Buffer:
        wide = torch.empty(tokens, width + self.r, device=self.a.device, dtype=self.a.dtype)
        return Buffer(wide, width, None)

    def lower_input(self, x: Buffer) -> None:
        """x A^T into x.low, and on into x.wide_rows, whose other columns are filled."""
        if self.r:
            with named("lora"):
                product(x.values, self.a, out=x.low)

    def lower_gradient(self, dy: Buffer) -> None:
        """dy sB into dy.low, and on into dy.wide_rows, whose other columns are filled."""
        if self.r:
            with named("lora"):
                product_transposed(dy.values, self.b, out=dy.low)

    def adapter_gradients(self, x: Buffer, dy: Buffer, flat: Tensor) -> None:
        """Write the gradients of `parameters()` one after another into `flat`.

        dA = (dy sB)^T x, all members in one product; dB = s dy^T (x A^T), member by member.
        """
        if not self.r:
            return
        with named("lora"):
            start = self.ranks * self.k
            _into(flat[:start].view(self.ranks, self.k), dy.low[:, : self.ranks].t(), x.values)
            for m in self.members:
                for lora in m.loras:
                    shape = lora.b.shape
                    db = flat[start : start + shape.numel()].view(shape)
                    _into(db, dy.values[:, m.rows].t(), x.low[:, lora.ranks])
                    if lora.scaling != 1.0:
                        db.mul_(lora.scaling)
                    start += shape.numel()

    def forward(self, x: Buffer, plus: Tensor | None = None) -> Tensor:
        """[S, N] from a filled buffer (low included); `plus` [S, N] is added."""
        raise NotImplementedError

    def backward(self, dy: Buffer) -> Tensor:
        """Gradient of the input, [S, K], from a filled gradient buffer (low included)."""
        raise NotImplementedError

    @property
    def gradient_scale(self) -> Tensor | None:
        """float32 [N]: what a gradient is multiplied with before its buffer's `rows` are quantized."""
        return None


class FullLinear(PackedLinear):
    """The members' weights in their own dtype, in one matrix [N + R, K + R]."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        like = base_of(modules[0]).weight
        self.matrix = torch.zeros(self.n + self.r, self.k + self.r, dtype=like.dtype, device=like.device)
        self.a = self.matrix[self.n :, : self.k]
        self.b = self.matrix[: self.n, self.k :]
        for member in self.members:
            base = base_of(member.module)
            rows = self.matrix[member.rows, : self.k]
            rows.copy_(weight_of(base))
            put_in_place(base, rows)

    def forward(self, x: Buffer, plus: Tensor | None = None) -> Tensor:
        return product(x.wide, self.matrix[: self.n], plus=plus)

    def backward(self, dy: Buffer) -> Tensor:
        return product_transposed(dy.wide, self.matrix[:, : self.k])


class Fp8Linear(PackedLinear):
    """The members' weights in e4m3, row-wise scaled, with the LoRA side in E columns more.

    Backward reads them transposed. Without a scratch they are kept that way, too; with one, every linear in
    its turn transposes them there (a pass over the weight, a thirtieth of its product's time at 4,736 tokens)
    and keeps only the E columns of its own. The factors are what `low` is multiplied with on its way into e4m3.
    """

    def __init__(self, modules: Sequence[nn.Module], scratch: Scratch | None = None) -> None:
        super().__init__(modules)
        like = base_of(modules[0]).weight
        self.a = torch.zeros(self.r, self.k, dtype=like.dtype, device=like.device)
        self.b = torch.zeros(self.n, self.r, dtype=like.dtype, device=like.device)
        self.input_factors, self.gradient_factors = torch.ones(2, self.r, device=like.device)
        self.e = folded_width(self.r)
        self.weight = _ones_and_zeros(self.n, self.k + self.e, like.device)
        for member in self.members:
            base = base_of(member.module)
            rows = Rowwise(self.weight.values[member.rows, : self.k], self.weight.scale[member.rows])
            fill_e4m3(base, rows)
            take_out(base)
        self.scratch = scratch
        self._kept = _ones_and_zeros(self.k, self.e if scratch else self.n + self.e, like.device)
        if scratch:
            scratch.reserve(self.k * (self.n + self.e))
        else:
            transpose(self.weight.values[:, : self.k], self._kept.values[:, : self.n])

    @property
    def transposed(self) -> Rowwise:
        """[K, N + E], with ones for scales."""
        if self.scratch is None:
            return self._kept
        values = self.scratch.take((self.k, self.n + self.e), torch.float8_e4m3fn, self._kept.values.device)
        transpose(self.weight.values[:, : self.k], values[:, : self.n])
        values[:, self.n :].copy_(self._kept.values)
        return Rowwise(values, self._kept.scale)

    def folds(self) -> list[Fold]:
        if not self.r:
            return []
        kept = self._kept
        return [
            Fold(self.b, self.weight.scale, self.weight.values[:, self.k :], self.input_factors),
            Fold(
                self.a.t(), kept.scale, kept.values[:, kept.values.shape[1] - self.e :], self.gradient_factors
            ),
        ]

    def _buffer(self, tokens: int, width: int) -> Buffer:
        buffer = super()._buffer(tokens, width)
        return replace(buffer, wide_rows=empty_rows(tokens, width + self.e, self.a.device))

    def lower_input(self, x: Buffer) -> None:
        super().lower_input(x)
        self._fold_low(x, self.input_factors)

    def lower_gradient(self, dy: Buffer) -> None:
        super().lower_gradient(dy)
        self._fold_low(dy, self.gradient_factors)

    def _fold_low(self, buffer: Buffer, factors: Tensor) -> None:
        if self.r and buffer.wide_rows is not None:
            with named("lora"):
                fold_low(buffer.low, factors, buffer.wide_rows)

    def forward(self, x: Buffer, plus: Tensor | None = None) -> Tensor:
        assert x.wide_rows is not None
        y = self.a.new_empty(len(x.wide), self.n)
        return product_rows_fp8(x.wide_rows, self.weight, out=y, plus=plus)

    def backward(self, dy: Buffer) -> Tensor:
        assert dy.wide_rows is not None
        dx = self.a.new_empty(len(dy.wide), self.k)
        return product_rows_fp8(dy.wide_rows, self.transposed, out=dx)

    @property
    def gradient_scale(self) -> Tensor:
        return self.weight.scale


def fill_e4m3(base: nn.Linear, rows: Rowwise) -> None:
    """Bring the linear's weight into `rows`."""
    fill(base, {"values": rows.values, "scale": rows.scale}, lambda: quantize_weight(weight_of(base), rows))


def _ones_and_zeros(rows: int, columns: int, device: torch.device) -> Rowwise:
    values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return Rowwise(values, torch.ones(rows, device=device))


def _into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:  # an adapter trained in float32 beside a bfloat16 model
        out.copy_(left @ right)


def padded_rank(ranks: int) -> int:
    """R: so many columns that rows of a matrix this much wider stay aligned."""
    return -(-ranks // ALIGNMENT) * ALIGNMENT


def base_of(module: nn.Module) -> nn.Linear:
    """The frozen linear itself, of PEFT's or a plain one."""
    return getattr(module, "base_layer", module)  # type: ignore[arg-type]


def adapter_order(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The adapters' parameters of linears that share their input: every A, then every B."""
    loras = [lora for m in _members(modules) for lora in m.loras]
    return [lora.a for lora in loras] + [lora.b for lora in loras]


def _members(modules: Sequence[nn.Module]) -> list[Member]:
    members, row, rank = [], 0, 0
    for module in modules:
        rows = base_of(module).weight.shape[0]
        loras = []
        for name, a in getattr(module, "lora_A", {}).items():
            ranks = slice(rank, rank + len(a.weight))
            loras.append(Lora(module, name, ranks))  # type: ignore[arg-type]
            rank = ranks.stop
        members.append(Member(module, slice(row, row + rows), tuple(loras)))
        row += rows
    return members
