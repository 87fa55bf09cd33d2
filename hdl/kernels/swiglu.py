"""The gated unit between the two halves of the MLP, and backward.

    h = silu(gate) * up          silu(g) = g s,   s = 1 / (1 + exp(-g))

    dgate = dh * up * s * (1 + g (1 - s))          dup = dh * silu(gate)

gate_up [S, 2M] is the fused projection: gate columns, then up columns. bfloat16 or float32; arithmetic
float32, each result rounded once. Backward may write h again, for the gradient of what consumed it: computed
anew it costs a store, kept it would cost M numbers a token from forward to backward.

Without quantization a program takes one piece of one row. With it the row's largest magnitude must be known
before anything is quantized, so a program takes a whole row, piece after piece, and keeps the float32 result,
M or 2M numbers, in its registers from the first reading to the last store. Rows are read past the L1 cache,
which then keeps `column_scale`, the same for every row and wider than a row itself.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton
from hdl.kernels.quantize import (
    Rowwise,
    check_quantized,
    parts,
    quantize_rows,
    row_stride,
    scale_of,
    to_e4m3,
)

PIECE = 1024  # columns of an unquantized program: 8 a thread, one 16-byte access a bfloat16 matrix


@dataclass(frozen=True)
class RowPlan:
    """How a program takes a whole row, which it does to quantize it."""

    piece: int  # columns at a time, a power of two; a row of M is best a multiple of it
    warps: int
    registers: int | None = None  # a thread, at most


# Among the fastest of those measured on an H200 at 4,736 rows of 12,288 (docs/measurements.md).
FORWARD = RowPlan(piece=4096, warps=16)
BACKWARD = RowPlan(piece=4096, warps=32)


def swiglu(gate_up: Tensor, *, out: Tensor | None = None, quantized: Rowwise | None = None) -> Tensor:
    """h = silu(gate) * up, [S, M] in gate_up's dtype.

    gate_up: [S, 2M], any row stride; out: what to fill; quantized: filled with h too. ValueError for shapes,
    dtypes or strides that do not fit.
    """
    S, M = gate_up.shape[0], gate_up.shape[1] // 2
    values_stride = check_quantized(quantized, None, S, M)
    out = torch.empty(S, M, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    stride = row_stride("gate_up", gate_up, (S, 2 * M), gate_up.dtype)
    out_stride = row_stride("out", out, (S, M), gate_up.dtype)
    if not runs_triton(gate_up):
        gate, up = gate_up.float().chunk(2, dim=1)
        h = gate * torch.sigmoid(gate) * up
        if quantized is not None:
            quantize_rows(h, into=quantized)
        return out.copy_(h)
    if quantized is not None:
        piece, options = _row(FORWARD, M)
        _forward_row_kernel[(S,)](
            gate_up, out, *parts(quantized), M, stride, out_stride, values_stride, piece, **options
        )
        return out
    block, pieces, options = _pieces(M)
    _forward_kernel[(S * pieces,)](gate_up, out, M, stride, out_stride, pieces, block, **options)
    return out


@triton.jit
def _forward_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    columns = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    _gated(gate_up + row * STRIDE, out + row * OUT_STRIDE, columns, M)


@triton.jit
def _forward_row_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECE)
    kept: tl.tuple = ()
    peaks = tl.zeros([PIECE], tl.float32)
    for start in tl.static_range(0, M, PIECE):
        h = _gated(gate_up + row * STRIDE, out + row * OUT_STRIDE, start + piece, M)
        peaks = tl.maximum(peaks, tl.abs(h))
        kept += (h,)
    peak = tl.max(peaks, axis=0)
    tl.store(scale + row, scale_of(peak))
    for start in tl.static_range(0, M, PIECE):
        columns = start + piece
        to = values + row * VALUES_STRIDE + columns
        tl.store(to, to_e4m3(kept[start // PIECE], peak), mask=columns < M)


@triton.jit
def _gated(gate_up: tl.tensor, out: tl.tensor, columns: tl.tensor, M: tl.constexpr) -> tl.tensor:
    """h of these columns of a row, float32; stored to out. 0 outside of the row."""
    inside = columns < M
    gate = tl.load(gate_up + columns, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    up = tl.load(gate_up + M + columns, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(out + columns, h.to(out.dtype.element_ty), mask=inside)
    return h


def swiglu_backward(
    dh: Tensor,
    gate_up: Tensor,
    *,
    out: Tensor | None = None,
    h: Tensor | None = None,
    quantized: Rowwise | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """dgate_up [S, 2M], laid out like gate_up.

    dh: [S, M]; gate_up: [S, 2M], as given to forward; out: what to fill; h: [S, M], filled with silu(gate) *
    up when given; quantized: filled with dgate_up * column_scale too, column_scale float32 [2M]. No output
    may lie over an input. ValueError for shapes, dtypes or strides that do not fit.
    """
    S, M = dh.shape
    values_stride = check_quantized(quantized, column_scale, S, 2 * M)
    out = torch.empty(S, 2 * M, dtype=dh.dtype, device=dh.device) if out is None else out
    strides = (
        row_stride("dh", dh, (S, M), dh.dtype),
        row_stride("gate_up", gate_up, (S, 2 * M), dh.dtype),
        row_stride("out", out, (S, 2 * M), dh.dtype),
        0 if h is None else row_stride("h", h, (S, M), dh.dtype),
    )
    if not runs_triton(gate_up):
        gate, up = gate_up.float().chunk(2, dim=1)
        s = torch.sigmoid(gate)
        dgate = dh.float() * up * s * (1 + gate * (1 - s))
        dgate_up = torch.cat([dgate, dh.float() * gate * s], dim=1)
        if h is not None:
            h.copy_(gate * s * up)
        if quantized is not None:
            quantize_rows(dgate_up, column_scale, quantized)
        return out.copy_(dgate_up)
    if quantized is not None:
        piece, options = _row(BACKWARD, M)
        _backward_row_kernel[(S,)](
            dh, gate_up, out, h, column_scale, *parts(quantized), M, *strides, values_stride, piece, **options
        )
        return out
    block, pieces, options = _pieces(M)
    _backward_kernel[(S * pieces,)](dh, gate_up, out, h, M, *strides, pieces, block, **options)
    return out


@triton.jit
def _backward_kernel(
    dh: tl.tensor,
    gate_up: tl.tensor,
    out: tl.tensor,
    h: tl.tensor,
    M: tl.constexpr,
    DH_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    columns = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < M
    inputs = _inputs(dh + row * DH_STRIDE, gate_up + row * STRIDE, columns, inside, M)
    _gradients(inputs, out, h, row * OUT_STRIDE, row * H_STRIDE, columns, inside, M)


@triton.jit
def _backward_row_kernel(
    dh: tl.tensor,
    gate_up: tl.tensor,
    out: tl.tensor,
    h: tl.tensor,
    column_scale: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    M: tl.constexpr,
    DH_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECE)
    inputs: tl.tuple = ()
    for start in tl.static_range(0, M, PIECE):  # all that is read of the row is on its way before any is used
        columns = start + piece
        inputs += (_inputs(dh + row * DH_STRIDE, gate_up + row * STRIDE, columns, columns < M, M),)
    dgates: tl.tuple = ()
    dups: tl.tuple = ()
    peaks = tl.zeros([PIECE], tl.float32)
    for start in tl.static_range(0, M, PIECE):
        columns = start + piece
        inside = columns < M
        dgate, dup = _gradients(
            inputs[start // PIECE], out, h, row * OUT_STRIDE, row * H_STRIDE, columns, inside, M
        )
        if column_scale is not None:
            dgate *= tl.load(column_scale + columns, mask=inside, other=0.0, eviction_policy="evict_last")
            dup *= tl.load(column_scale + M + columns, mask=inside, other=0.0, eviction_policy="evict_last")
        peaks = tl.maximum(peaks, tl.maximum(tl.abs(dgate), tl.abs(dup)))
        dgates += (dgate,)
        dups += (dup,)
    peak = tl.max(peaks, axis=0)
    tl.store(scale + row, scale_of(peak))
    for start in tl.static_range(0, M, PIECE):
        to = values + row * VALUES_STRIDE + start + piece
        inside = start + piece < M
        tl.store(to, to_e4m3(dgates[start // PIECE], peak), mask=inside)
        tl.store(to + M, to_e4m3(dups[start // PIECE], peak), mask=inside)


@triton.jit
def _inputs(
    dh: tl.tensor, gate_up: tl.tensor, columns: tl.tensor, inside: tl.tensor, M: tl.constexpr
) -> tl.tuple:
    """dh, gate and up of these columns of a row, as they are stored."""
    return (
        tl.load(dh + columns, mask=inside, other=0.0, cache_modifier=".cg"),
        tl.load(gate_up + columns, mask=inside, other=0.0, cache_modifier=".cg"),
        tl.load(gate_up + M + columns, mask=inside, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def _gradients(
    inputs: tl.tuple,
    out: tl.tensor,
    h: tl.tensor,
    out_row: tl.tensor,
    h_row: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    M: tl.constexpr,
) -> tl.tuple:
    """dgate and dup of these columns of a row, float32; stored to out, and h where it is not None."""
    dh, gate, up = inputs
    dh = dh.to(tl.float32)
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dgate = dh * up * (s + silu * (1.0 - s))
    dup = dh * silu
    tl.store(out + out_row + columns, dgate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + out_row + M + columns, dup.to(out.dtype.element_ty), mask=inside)
    if h is not None:
        tl.store(h + h_row + columns, (silu * up).to(h.dtype.element_ty), mask=inside)
    return dgate, dup


def _pieces(M: int) -> tuple[int, int, dict[str, int]]:
    """Columns of a program, programs a row, and the launch's options."""
    block = min(triton.next_power_of_2(M), PIECE)
    return block, triton.cdiv(M, block), {"num_warps": max(block // 256, 1)}


def _row(plan: RowPlan, M: int) -> tuple[int, dict[str, int]]:
    """Columns at a time of a program that takes whole rows, and the launch's options."""
    piece = min(triton.next_power_of_2(M), plan.piece)
    options = {"num_warps": max(plan.warps * piece // plan.piece, 1)}
    return piece, options if plan.registers is None else {**options, "maxnreg": plan.registers}
