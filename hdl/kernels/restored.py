"""Frozen linears whose weights are kept small or elsewhere, and brought back for every product.

nf4, and e4m3 where the GPU cannot multiply in it, are made bfloat16 anew in a scratch that all linears share.
Weights of a layer that is streamed (hdl/memory/streaming.py) are multiplied with in the slot where they have
arrived, and e4m3 in e4m3. All of them keep the LoRA side apart, as a product of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hdl.kernels.backend import named
from hdl.kernels.gemm import product, product_rows_fp8, product_transposed
from hdl.kernels.linears import Buffer, Member, PackedLinear, base_of, fill_e4m3
from hdl.kernels.quantize import Rowwise, empty_rows
from hdl.kernels.scratch import Scratch
from hdl.kernels.transpose import transpose
from hdl.memory.absent import take_out, weight_of
from hdl.memory.cache import fill
from hdl.memory.streaming import Part


class RestoredLinear(PackedLinear):
    """Base of forms that are only kept: for each product the weights are brought back to their dtype in the
    scratch; the LoRA side is a product of its own, so that what is kept can move (hdl/memory/streaming.py).
    """

    def __init__(self, modules: Sequence[nn.Module], scratch: Scratch, resident: bool = True) -> None:
        """resident: keep the weights on their device, from now on; else they are where `keep_in` says."""
        super().__init__(modules)
        like = base_of(modules[0]).weight
        self.dtype, self.device = like.dtype, like.device
        self.a = torch.zeros(self.r, self.k, dtype=like.dtype, device=like.device)
        self.b = torch.zeros(self.n, self.r, dtype=like.dtype, device=like.device)
        self.scratch = scratch
        scratch.reserve(self._scratch_bytes())
        if resident:
            self.keep_in(
                [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.kept_as()]
            )
            self.fill()

    def kept_as(self) -> list[Part]:
        """Shape and dtype of each tensor that the weights are kept in; known without the weights."""
        raise NotImplementedError

    def keep_in(self, parts: Sequence[Tensor]) -> None:
        """Let these tensors, as `kept_as` describes them, be the weights, whatever is in them."""
        raise NotImplementedError

    def fill(self) -> None:
        """Bring the members' weights into the kept form, one by one."""
        for member in self.members:
            base = base_of(member.module)
            self._keep(member, base)
            take_out(base)

    def pass_over(self) -> None:
        """Let go of the members' weights: somebody else fills the same memory."""
        for member in self.members:
            take_out(base_of(member.module))

    def remember(self, parts: Sequence[Tensor]) -> None:
        """Keep what is needed of weights that move while they are away; parts: as kept, on any device."""

    def _keep(self, member: Member, base: nn.Linear) -> None:
        """Bring the base's weight into the member's part of what is kept."""
        raise NotImplementedError

    def _scratch_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize

    def _restore(self, weight: Tensor) -> None:
        """Fill [N, K]."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """[N, K], until the next linear takes the scratch."""
        weight = self.scratch.take((self.n, self.k), self.dtype, self.device)
        self._restore(weight)
        return weight

    def forward(self, x: Buffer, plus: Tensor | None = None) -> Tensor:
        y = self.a.new_empty(len(x.wide), self.n)
        if self.r:
            with named("lora"):
                plus = product(x.low, self.b, out=y, plus=plus)
        return self._product(x, y, plus)

    def backward(self, dy: Buffer) -> Tensor:
        dx, plus = self.a.new_empty(len(dy.wide), self.k), None
        if self.r:
            with named("lora"):
                plus = product_transposed(dy.low, self.a, out=dx)
        return self._product_transposed(dy, dx, plus)

    def _product(self, x: Buffer, out: Tensor, plus: Tensor | None) -> Tensor:
        return product(x.values, self.weight(), out=out, plus=plus)

    def _product_transposed(self, dy: Buffer, out: Tensor, plus: Tensor | None) -> Tensor:
        return product_transposed(dy.values, self.weight(), out=out, plus=plus)


class FullStoredLinear(RestoredLinear):
    """The weights in their own dtype, multiplied with where they are."""

    def kept_as(self) -> list[Part]:
        return [((self.n, self.k), self.dtype)]

    def keep_in(self, parts: Sequence[Tensor]) -> None:
        (self.kept,) = parts

    def _keep(self, member: Member, base: nn.Linear) -> None:
        self.kept[member.rows].copy_(weight_of(base))

    def _scratch_bytes(self) -> int:
        return 0

    def weight(self) -> Tensor:
        return self.kept


class Nf4Linear(RestoredLinear):
    """bitsandbytes' nf4: blocks of 64 numbers, half a byte each, and their scales in 8 bits."""

    BLOCK, SCALES_BLOCK = 64, 256  # bitsandbytes' own choice

    def kept_as(self) -> list[Part]:
        """Of each member: values, scales, and what the scales are scaled with and lie around."""
        parts: list[Part] = []
        for member in self.members:
            numbers = (member.rows.stop - member.rows.start) * self.k
            scales = -(-numbers // self.BLOCK)
            parts += [
                ((-(-numbers // 2), 1), torch.uint8),
                ((scales,), torch.uint8),
                ((-(-scales // self.SCALES_BLOCK),), torch.float32),
                ((), torch.float32),
            ]
        return parts

    def keep_in(self, parts: Sequence[Tensor]) -> None:
        from bitsandbytes.functional import quantize_4bit  # takes seconds to import

        self.kept: list[tuple[Tensor, Any]] = []  # by member: values, and bitsandbytes' QuantState
        for i, member in enumerate(self.members):
            values, scales, outer_scales, offset = parts[4 * i : 4 * i + 4]
            some = torch.zeros(1, self.BLOCK, dtype=self.dtype, device=self.device)
            # For its tables, which are always the same.
            _, state = quantize_4bit(some, blocksize=self.BLOCK, quant_type="nf4", compress_statistics=True)
            state.shape = torch.Size((member.rows.stop - member.rows.start, self.k))
            state.absmax, state.state2.absmax, state.offset = scales, outer_scales, offset
            self.kept.append((values, state))

    def _keep(self, member: Member, base: nn.Linear) -> None:
        values, state = self.kept[self.members.index(member)]
        parts = {
            "values": values,
            "scales": state.absmax,
            "outer_scales": state.state2.absmax,
            "offset": state.offset,
        }
        fill(base, parts, lambda: self._quantize(weight_of(base), parts))

    def _quantize(self, weight: Tensor, parts: Mapping[str, Tensor]) -> None:
        from bitsandbytes.functional import quantize_4bit

        values, state = quantize_4bit(
            weight, blocksize=self.BLOCK, quant_type="nf4", compress_statistics=True
        )
        for name, made in (
            ("values", values),
            ("scales", state.absmax),
            ("outer_scales", state.state2.absmax),
            ("offset", state.offset),
        ):
            parts[name].copy_(made)

    def _restore(self, weight: Tensor) -> None:
        from bitsandbytes.functional import dequantize_4bit

        for member, (values, state) in zip(self.members, self.kept):
            rows = weight[member.rows]
            if rows.is_cuda:
                dequantize_4bit(values, state, out=rows)
            else:  # its CPU version fills no tensor that is given
                rows.copy_(dequantize_4bit(values, state))


class Fp8StoredLinear(RestoredLinear):
    """e4m3, row-wise scaled, for GPUs that cannot multiply in it."""

    def kept_as(self) -> list[Part]:
        return [((self.n, self.k), torch.float8_e4m3fn), ((self.n,), torch.float32)]

    def keep_in(self, parts: Sequence[Tensor]) -> None:
        self.kept = Rowwise(*parts)

    def _keep(self, member: Member, base: nn.Linear) -> None:
        fill_e4m3(base, Rowwise(self.kept.values[member.rows], self.kept.scale[member.rows]))

    def _restore(self, weight: Tensor) -> None:
        weight.copy_(self.kept.values).mul_(self.kept.scale[:, None])


class Fp8MovingLinear(Fp8StoredLinear):
    """The same, multiplied in e4m3 where it is, and transposed into the scratch for backward.

    Fp8Linear's way with the LoRA side, in the rows of the weights themselves, is not open to weights that move:
    it changes with every step.
    """

    def __init__(self, modules: Sequence[nn.Module], scratch: Scratch, resident: bool = True) -> None:
        super().__init__(modules, scratch, resident)
        self.ones = torch.ones(self.k, device=self.device)
        if resident:
            self.remember([self.kept.values, self.kept.scale])

    def remember(self, parts: Sequence[Tensor]) -> None:
        # The layer above quantizes its gradient for this one while these weights may still be on their way.
        self.scale = parts[1].to(self.device, copy=True)

    def _scratch_bytes(self) -> int:
        return self.n * self.k

    def _buffer(self, tokens: int, width: int) -> Buffer:
        return replace(super()._buffer(tokens, width), wide_rows=empty_rows(tokens, width, self.device))

    def _product(self, x: Buffer, out: Tensor, plus: Tensor | None) -> Tensor:
        assert x.rows is not None
        return product_rows_fp8(x.rows, self.kept, out=out, plus=plus)

    def _product_transposed(self, dy: Buffer, out: Tensor, plus: Tensor | None) -> Tensor:
        assert dy.rows is not None
        values = self.scratch.take((self.k, self.n), torch.float8_e4m3fn, self.device)
        transpose(self.kept.values, values)
        return product_rows_fp8(dy.rows, Rowwise(values, self.ones), out=out, plus=plus)

    @property
    def gradient_scale(self) -> Tensor:
        return self.scale
