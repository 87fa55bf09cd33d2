"""The gated unit between the two halves of the MLP, and backward.

    h = silu(gate) * up          silu(g) = g s,   s = 1 / (1 + exp(-g))

    dgate = dh * up * s * (1 + g (1 - s))          dup = dh * silu(gate)

gate_up [S, 2M] is the fused projection: gate columns, then up columns. bfloat16 or float32; arithmetic
float32, each result rounded once. Backward may write h again, for the gradient of what consumed it: computed
anew it costs a store, kept it would cost M numbers a token from forward to backward.

Without quantization a program takes one piece of one row. With it the row's largest magnitude must be known
before anything is quantized, so one program takes a whole row twice: too wide for registers (3M numbers of
input), it is still in the L2 cache the second time. Rows are read past the L1 cache, which then keeps
`column_scale`, the same for every row and wider than a row itself.
"""

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
PIECE_OF_ROW = 4096  # the same, of the many warps that share a quantized row


def swiglu(gate_up: Tensor, *, out: Tensor | None = None, quantized: Rowwise | None = None) -> Tensor:
    """h = silu(gate) * up, [S, M] in gate_up's dtype.

    gate_up: [S, 2M], any row stride; out: what to fill; quantized: filled with h too. ValueError for shapes,
    dtypes or strides that do not fit.
    """
    S, M = gate_up.shape[0], gate_up.shape[1] // 2
    check_quantized(quantized, None, S, M)
    out = torch.empty(S, M, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    stride = row_stride("gate_up", gate_up, (S, 2 * M), gate_up.dtype)
    out_stride = row_stride("out", out, (S, M), gate_up.dtype)
    if not runs_triton(gate_up):
        gate, up = gate_up.float().chunk(2, dim=1)
        h = gate * torch.sigmoid(gate) * up
        if quantized is not None:
            quantize_rows(h, into=quantized)
        return out.copy_(h)
    block, pieces, options = _pieces(M, quantized is not None)
    _forward_kernel[(S * pieces,)](
        gate_up, out, *parts(quantized), M, stride, out_stride, pieces, block, **options
    )
    return out


@triton.jit
def _forward_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.arange(0, BLOCK)
    gate_up += row * STRIDE
    out += row * OUT_STRIDE
    if values is None:
        columns = (tl.program_id(0) % PIECES) * BLOCK + piece
        inside = columns < M
        gate = tl.load(gate_up + columns, mask=inside, other=0.0)
        up = tl.load(gate_up + M + columns, mask=inside, other=0.0)
        tl.store(out + columns, _gated(gate, up).to(gate.dtype), mask=inside)
    else:
        peaks = tl.zeros([BLOCK], tl.float32)
        for start in range(0, M, BLOCK):
            columns = start + piece
            inside = columns < M
            gate = tl.load(gate_up + columns, mask=inside, other=0.0, cache_modifier=".cg")
            up = tl.load(gate_up + M + columns, mask=inside, other=0.0, cache_modifier=".cg")
            peaks = tl.maximum(peaks, tl.abs(_gated(gate, up)))
        peak = tl.max(peaks, axis=0)
        tl.store(scale + row, scale_of(peak))
        values += row * M
        for start in range(0, M, BLOCK):
            columns = start + piece
            inside = columns < M
            gate = tl.load(gate_up + columns, mask=inside, other=0.0, cache_modifier=".cg")
            up = tl.load(gate_up + M + columns, mask=inside, other=0.0, cache_modifier=".cg")
            h = _gated(gate, up)
            tl.store(out + columns, h.to(gate.dtype), mask=inside)
            tl.store(values + columns, to_e4m3(h, peak), mask=inside)


@triton.jit
def _gated(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(tl.float32)


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
    check_quantized(quantized, column_scale, S, 2 * M)
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
    block, pieces, options = _pieces(M, quantized is not None)
    _backward_kernel[(S * pieces,)](
        dh,
        gate_up,
        out,
        h,
        column_scale,
        *parts(quantized),
        M,
        *strides,
        pieces,
        block,
        **options,
    )
    return out


@triton.jit
def _backward_kernel(
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
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.arange(0, BLOCK)
    dh += row * DH_STRIDE
    gate_up += row * STRIDE
    out += row * OUT_STRIDE
    if h is not None:
        h += row * H_STRIDE
    if values is None:
        columns = (tl.program_id(0) % PIECES) * BLOCK + piece
        _gated_backward(dh, gate_up, out, h, columns, M)
    else:
        peaks = tl.zeros([BLOCK], tl.float32)
        for start in range(0, M, BLOCK):
            columns = start + piece
            dgate, dup = _gated_backward(dh, gate_up, None, None, columns, M)
            dgate, dup = _scaled(dgate, dup, column_scale, columns, M)
            peaks = tl.maximum(peaks, tl.maximum(tl.abs(dgate), tl.abs(dup)))
        peak = tl.max(peaks, axis=0)
        tl.store(scale + row, scale_of(peak))
        values += row * 2 * M
        for start in range(0, M, BLOCK):
            columns = start + piece
            dgate, dup = _gated_backward(dh, gate_up, out, h, columns, M)
            dgate, dup = _scaled(dgate, dup, column_scale, columns, M)
            tl.store(values + columns, to_e4m3(dgate, peak), mask=columns < M)
            tl.store(values + M + columns, to_e4m3(dup, peak), mask=columns < M)


@triton.jit
def _gated_backward(
    dh: tl.tensor, gate_up: tl.tensor, out: tl.tensor, h: tl.tensor, columns: tl.tensor, M: tl.constexpr
) -> tl.tensor:
    """dgate and dup of these columns of a row, float32; stored to out, and h to h, where they are not None."""
    inside = columns < M
    dh_piece = tl.load(dh + columns, mask=inside, other=0.0, cache_modifier=".cg")
    gate = tl.load(gate_up + columns, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    up = tl.load(gate_up + M + columns, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    dh_float = dh_piece.to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dgate = dh_float * up * (s + silu * (1.0 - s))
    dup = dh_float * silu
    if out is not None:
        tl.store(out + columns, dgate.to(dh_piece.dtype), mask=inside)
        tl.store(out + M + columns, dup.to(dh_piece.dtype), mask=inside)
    if h is not None:
        tl.store(h + columns, (silu * up).to(dh_piece.dtype), mask=inside)
    return dgate, dup


@triton.jit
def _scaled(
    dgate: tl.tensor, dup: tl.tensor, column_scale: tl.tensor, columns: tl.tensor, M: tl.constexpr
) -> tl.tensor:
    if column_scale is not None:
        inside = columns < M
        dgate *= tl.load(column_scale + columns, mask=inside, other=0.0, eviction_policy="evict_last")
        dup *= tl.load(column_scale + M + columns, mask=inside, other=0.0, eviction_policy="evict_last")
    return dgate, dup


def _pieces(M: int, whole_row: bool) -> tuple[int, int, dict[str, int]]:
    """Columns a step of a program, programs a row, and the launch's options."""
    block = min(triton.next_power_of_2(M), PIECE_OF_ROW if whole_row else PIECE)
    warps = max(block // 256, 1)
    if whole_row:  # so few registers that two programs share a multiprocessor: one reads while one writes
        return block, 1, {"num_warps": warps, "maxnreg": 64}
    return block, triton.cdiv(M, block), {"num_warps": warps}
