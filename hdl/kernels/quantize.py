"""Rows in e4m3: x [S, D] -> values float8_e4m3fn [S, D] and scale float32 [S], x ≈ values * scale[:, None].

    scale = max(max|x|, LEAST_PEAK) / 448        values = round(x / scale), to nearest, ties to even

One scale a row, so that a row-wise scaled matrix product takes both as they are. A row of zeros gets zeros
and a tiny scale; a row holding inf or nan stays non-finite, because a broken step must be seen.

`column_scale` multiplies the columns first. A frozen weight [out, in] is quantized once, with one scale an
output channel. Forward, that scale lies along the product's columns and is applied after it; backward, it
lies along the contraction, where no scaled product takes it. So it is folded into the gradient before the
gradient is quantized, and one stored copy of the values serves both directions.

Frozen weights take up less of e4m3's range (`quantize_weight`): the LoRA columns that stand beside them in a
product (hdl/kernels/folded.py) share their rows' scale and need the room above.

The other kernels of the decoder layer quantize their own result before it leaves the registers: what they
share stands here, `row_stride` for the host and `scale_of`, `to_e4m3` for the kernels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton

E4M3_MAX = 448.0
LEAST_PEAK = 1e-30  # a smaller one's inverse would leave float32
WEIGHT_PEAK = 14.0  # E4M3_MAX / 32
WEIGHT_ROWS_RANGE = 16.0  # of the largest scale of a weight's rows to the smallest
MAX_WARPS = 16


@dataclass(frozen=True)
class Rowwise:
    """A matrix in e4m3: values float8_e4m3fn [S, D], rows apart or next to each other; scale float32 [S]."""

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """values * scale, float32 [S, D]."""
        return self.values.float() * self.scale[:, None]

    def columns(self, first: int, end: int) -> "Rowwise":
        """Some of the columns, where they are."""
        return Rowwise(self.values[:, first:end], self.scale)


def empty_rows(rows: int, columns: int, device: torch.device | str) -> Rowwise:
    """Room for [rows, columns], not initialised."""
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return Rowwise(values, torch.empty(rows, dtype=torch.float32, device=device))


def parts(quantized: Rowwise | None) -> tuple[Tensor | None, Tensor | None]:
    """values and scale as kernels take them: both None where nothing is to be quantized."""
    return (None, None) if quantized is None else (quantized.values, quantized.scale)


def quantize_rows(x: Tensor, column_scale: Tensor | None = None, into: Rowwise | None = None) -> Rowwise:
    """x * column_scale in e4m3, one scale a row.

    x: [S, D] bfloat16 or float32, columns next to each other, any row stride; column_scale: float32 [D];
    into: what to fill and return, allocated when None. ValueError for shapes or strides that do not fit.
    """
    S, D = x.shape
    into = into or empty_rows(S, D, x.device)
    stride = row_stride("x", x, (S, D), x.dtype)
    values_stride = check_quantized(into, column_scale, S, D)
    if not runs_triton(x):
        return _quantize_plain(x, column_scale, into)
    block = triton.next_power_of_2(D)
    _quantize_kernel[(S,)](
        x, column_scale, *parts(into), D, stride, values_stride, block, num_warps=warps_for(block)
    )
    return into


def _quantize_plain(x: Tensor, column_scale: Tensor | None, into: Rowwise) -> Rowwise:
    scaled = x.float() if column_scale is None else x.float() * column_scale
    peak = scaled.abs().amax(-1).clamp(min=LEAST_PEAK)
    into.scale.copy_(peak / E4M3_MAX)
    into.values.copy_((scaled * (E4M3_MAX / peak)[:, None]).clamp(-E4M3_MAX, E4M3_MAX))
    return into


def quantize_weight(weight: Tensor, into: Rowwise) -> Rowwise:
    """A frozen weight [N, K], in e4m3 with one scale an output channel; fills and returns `into`.

        scale = max(max|w|, max|W| / 16, LEAST_PEAK) / 14        values = round(w / scale)

    A peak of 14 instead of 448 is as exact (but for numbers below 1e-3 of the row's largest, subnormal here),
    and leaves the range above to what stands beside the weight. The floor keeps a channel that is nearly or
    entirely zero from a scale so small that what stands beside it does not fit; down to a 1/1000 of the floor a
    channel's largest numbers lose nothing by it. ValueError as for `quantize_rows`.
    """
    check_quantized(into, None, *weight.shape)
    peak = torch.linalg.vector_norm(weight, torch.inf, dim=1, dtype=torch.float32)
    peak = torch.maximum(peak, peak.max() / WEIGHT_ROWS_RANGE).clamp(min=LEAST_PEAK)
    into.scale.copy_(peak / WEIGHT_PEAK)
    into.values.copy_(weight * (WEIGHT_PEAK / peak)[:, None])  # float32, whatever the weight's dtype
    return into


@triton.jit
def _quantize_kernel(
    x: tl.tensor,
    column_scale: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    result = tl.load(x + row * STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    store_rowwise(result, column_scale, values, scale, row, columns, inside, VALUES_STRIDE)


@triton.jit
def store_rowwise(
    result: tl.tensor,
    column_scale: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    VALUES_STRIDE: tl.constexpr,
) -> None:
    """Quantize one row held in registers; what lies outside of the mask must be 0."""
    if column_scale is not None:
        result *= tl.load(column_scale + columns, mask=inside, other=0.0, eviction_policy="evict_last")
    peak = tl.max(tl.abs(result), axis=0)
    tl.store(scale + row, scale_of(peak))
    tl.store(values + row * VALUES_STRIDE + columns, to_e4m3(result, peak), mask=inside)


@triton.jit
def scale_of(peak: tl.tensor) -> tl.tensor:
    return tl.maximum(peak, _LEAST_PEAK) / _E4M3_MAX


@triton.jit
def to_e4m3(x: tl.tensor, peak: tl.tensor) -> tl.tensor:
    return (x * (_E4M3_MAX / tl.maximum(peak, _LEAST_PEAK))).to(tl.float8e4nv)


_E4M3_MAX = tl.constexpr(E4M3_MAX)
_LEAST_PEAK = tl.constexpr(LEAST_PEAK)


def warps_for(block: int) -> int:
    """Warps of a program that holds `block` columns of a row: 16 columns a thread where they suffice."""
    return min(max(block // (16 * 32), 1), MAX_WARPS)


def row_stride(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many elements lie between the starts of two rows; all of a row must lie side by side.

    x: `shape` and `dtype`, [S, columns] or [S, heads, d]. ValueError, naming x, if it is anything else.
    """
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, expected {dtype} {list(shape)}")
    width = 1
    for size, stride in zip(reversed(shape[1:]), reversed(x.stride()[1:])):
        if stride != width and size > 1:
            raise ValueError(f"{name} has strides {x.stride()}; within a row its elements must be adjacent")
        width *= size
    return x.stride(0) if shape[0] > 1 else width  # a lone row's stride says nothing: torch may give any


def check_quantized(quantized: Rowwise | None, column_scale: Tensor | None, rows: int, columns: int) -> int:
    """The row stride of quantized's values, 0 without any.

    ValueError unless both, where given, have the shapes, dtypes and strides of a [rows, columns] result."""
    if column_scale is not None:
        if column_scale.dtype != torch.float32 or column_scale.shape != (columns,):
            raise ValueError(
                f"column_scale is {column_scale.dtype} {list(column_scale.shape)}, "
                f"expected torch.float32 [{columns}]"
            )
        if not column_scale.is_contiguous():
            raise ValueError("column_scale is not contiguous")
        if quantized is None:
            raise ValueError("column_scale only touches what is quantized, and nothing is: pass `quantized`")
    if quantized is None:
        return 0
    stride = row_stride("quantized.values", quantized.values, (rows, columns), torch.float8_e4m3fn)
    scale = quantized.scale
    if scale.shape != (rows,) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"quantized.scale is {scale.dtype} {list(scale.shape)}, expected contiguous torch.float32 [{rows}]"
        )
    return stride
