"""The LoRA side inside of an e4m3 product: a longer inner dimension instead of a product of its own.

    y = x W^T + low sB^T,    low [S, R] = x A^T

With x and W in e4m3 (hdl/kernels/quantize.py), scales sx [S] and sw [N], the small product becomes E more
columns of the large one, E being 4R rounded up to 128:

    activations   [ x_q | low_hi | low_lo | low_hi | low_lo | 0 ]    [S, K + E]
    weights       [ W_q |  B_hi  |  B_hi  |  B_lo  |  B_lo  | 0 ]    [N, K + E]

    low_q[s, r] = low[s, r] / (sx[s] c[r])        B_q[n, r] = sB[n, r] c[r] / sw[n]

Each number v of low_q and B_q is the sum of two e4m3 numbers, hi = e4m3(v) and lo = e4m3(v - hi), which have
8 significant bits together, as many as bfloat16, down to |v| = 1/4; below, the error is at most 2^-10. The
columns hold all four products of halves.

c[r] is the power of two that puts the largest B_q of a rank between 64 and 128, where W_q ends at 14: what a
LoRA adds may be as large as the frozen product before low_q saturates, at 448 + 448 because hi and lo both do.
It is nearer where sw differs much between the rows, as the rank's smallest row decides c (`quantize_weight`
keeps them within 16). What a rank adds is lost only below 2^-10 * 128, half of low_q's least step times the
largest B_q, beside a sum of K products of up to 448 * 14. A rank that is all zero has c = 1.

Backward is the same with A^T [K, R] for sB, dy's rows (multiplied with sw and quantized) for x's and ones for
sw. Both matrices beside frozen weights change with each step of the optimizer: `Folds` rewrites them for a
whole model in two launches, at the same addresses. What the activations' side is multiplied with, 1 / c, is
kept beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton
from hdl.kernels.quantize import Rowwise, row_stride

MULTIPLE = 128  # of columns: e4m3 products like their rows to begin at whole cache lines
PARTS = 4  # hi and lo of one side times hi and lo of the other
PEAK_EXPONENT = 7  # the largest number of a rank lies in (2^6, 2^7]
LARGEST_EXPONENT = 60  # c and its inverse stay between 2^-60 and 2^60
ROWS, RANKS, WARPS = 128, 32, 8  # the tile of a program that folds weights
LOW_ROWS = 32  # the tile of one that folds activations, by MULTIPLE columns


def folded_width(ranks: int) -> int:
    """E, the columns that a LoRA side of so many ranks takes; 0 for none."""
    return -(-PARTS * ranks // MULTIPLE) * MULTIPLE


def fold_low(low: Tensor, factors: Tensor, rows: Rowwise) -> None:
    """Fill the last columns of `rows` with [hi | lo | hi | lo | 0] of low / scale * factors.

    low: [S, R] bfloat16 or float32, any row stride; factors: float32 [R], 1 / c; rows: [S, width + E], of which
    the scale is read. ValueError for shapes, dtypes or strides that do not fit.
    """
    S, R = low.shape
    E = folded_width(R)
    into = rows.values[:, rows.values.shape[1] - E :]
    low_stride = row_stride("low", low, (S, R), low.dtype)
    stride = row_stride("rows.values", into, (S, E), torch.float8_e4m3fn)
    if factors.shape != (R,) or factors.dtype != torch.float32 or not factors.is_contiguous():
        raise ValueError(f"factors is {factors.dtype} {list(factors.shape)}, expected torch.float32 [{R}]")
    if not runs_triton(low):
        hi, lo = _halves_plain(low.float() * (1 / rows.scale)[:, None] * factors)
        into.copy_(torch.cat([hi, lo, hi, lo, hi.new_zeros(S, E - PARTS * R)], dim=1))
        return
    _fold_low_kernel[(triton.cdiv(S, LOW_ROWS), E // MULTIPLE)](
        low, factors, rows.scale, into, S, R, low_stride, stride, LOW_ROWS, MULTIPLE
    )


@triton.jit
def _fold_low_kernel(
    low: tl.tensor,
    factors: tl.tensor,
    scale: tl.tensor,
    into: tl.tensor,
    S: tl.tensor,
    R: tl.constexpr,
    LOW_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    rank = column % R
    part = column // R
    inside = row < S
    used = part < _PARTS
    value = tl.load(low + row * LOW_STRIDE + rank, mask=inside & used, other=0.0).to(tl.float32)
    value *= 1.0 / tl.load(scale + row, mask=inside, other=1.0)
    hi, lo = _halves(value * tl.load(factors + rank))
    half = tl.where(used, tl.where(part % 2 == 0, hi, lo), 0.0)
    tl.store(into + row * STRIDE + column, half.to(tl.float8e4nv), mask=inside)


@dataclass(frozen=True)
class Fold:
    """One LoRA matrix that stands beside a frozen weight in an e4m3 product.

    matrix: [N, R], sB or A^T, one of its strides 1; scale: float32 [N], of the weight's rows; columns: e4m3
    [N, E], filled with [hi | hi | lo | lo | 0] (the 0 stays what it was when allocated); factors: float32 [R],
    filled with 1 / c.
    """

    matrix: Tensor
    scale: Tensor
    columns: Tensor
    factors: Tensor


class Folds:
    """All folds of a model, on one device, whose tensors stay where they are."""

    def __init__(self, folds: Sequence[Fold]) -> None:
        self.folds = folds
        if not folds:
            return
        device = folds[0].matrix.device
        programs = [(i, p) for i, f in enumerate(folds) for p in range(triton.cdiv(len(f.matrix), ROWS))]
        most = max(f.matrix.shape[1] for f in folds)
        self._programs = torch.tensor(programs, dtype=torch.int32, device=device)
        self._peaks = torch.zeros(len(folds), most, dtype=torch.float32, device=device)
        table = [_described(f, peaks) for f, peaks in zip(folds, self._peaks)]
        self._table = torch.tensor(table, device=device)
        self._aligned = all(map(_aligned, folds))

    def refresh(self) -> None:
        """Bring what the matrices hold now into the columns and factors."""
        if not self.folds:
            return
        first = self.folds[0]
        if not runs_triton(first.matrix):
            for fold in self.folds:
                _fold_plain(fold)
            return
        self._peaks.zero_()
        like = (first.matrix, self._peaks)  # the table's pointers are typed by these
        arguments = (self._table, self._programs, *like)
        constants = (FIELDS, self._aligned, ROWS, RANKS)
        with torch.cuda.device_of(first.matrix):
            _peaks_kernel[(len(self._programs),)](*arguments, *constants, num_warps=WARPS)
            _columns_kernel[(len(self._programs),)](*arguments, first.columns, *constants, num_warps=WARPS)


# What the kernels know of a fold, as int64: addresses of matrix, scale, columns, factors and peaks, then N, R, the
# row strides of the matrix and of the columns, and whether the matrix is read across, as A^T is.
FIELDS = 10


def _described(fold: Fold, peaks: Tensor) -> list[int]:
    N, R = fold.matrix.shape
    across = fold.matrix.stride(1) != 1  # A^T: read along N
    pointers = [t.data_ptr() for t in (fold.matrix, fold.scale, fold.columns, fold.factors, peaks)]
    return [*pointers, N, R, fold.matrix.stride(1 if across else 0), fold.columns.stride(0), int(across)]


def _aligned(fold: Fold) -> bool:
    """Whether rows begin at 16 bytes in the matrix and in the columns, and end at a multiple of 8 numbers."""
    N, R = fold.matrix.shape
    bytes_apart = max(fold.matrix.stride()) * fold.matrix.element_size() | fold.columns.stride(0)
    pointers = fold.matrix.data_ptr() | fold.columns.data_ptr()
    return (pointers | bytes_apart) % 16 == 0 and (N | R) % 8 == 0


def _fold_plain(fold: Fold) -> None:
    R = fold.matrix.shape[1]
    scaled = fold.matrix.float() * (1 / fold.scale)[:, None]
    c = _power(scaled.abs().amax(0))
    fold.factors.copy_(1 / c)
    hi, lo = _halves_plain(scaled * c)
    fold.columns[:, : PARTS * R].copy_(torch.cat([hi, hi, lo, lo], dim=1))


def _power(peak: Tensor) -> Tensor:
    """c: the power of two that brings peak into (64, 128], 1 for a peak of 0; not finite peaks get any."""
    exponent = (peak.view(torch.int32) + 0x7FFFFF >> 23) - 127  # of the next power of two, or the same
    exponent = (PEAK_EXPONENT - exponent).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where(peak > 0, (127 + exponent << 23).view(torch.float32), 1.0)


def _halves_plain(value: Tensor) -> tuple[Tensor, Tensor]:
    """hi and lo, as float32."""
    value = torch.where(value.isfinite(), value, torch.nan)
    hi = _rounded_plain(value)
    return hi, _rounded_plain(value - hi)


def _rounded_plain(value: Tensor) -> Tensor:
    return value.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


@triton.jit
def _peaks_kernel(
    table: tl.tensor,
    programs: tl.tensor,
    like_matrix: tl.tensor,
    like_float: tl.tensor,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """The largest magnitude of each rank over its rows' scales."""
    fold = table + tl.load(programs + tl.program_id(0) * 2) * FIELDS
    row = tl.load(programs + tl.program_id(0) * 2 + 1) * ROWS + tl.arange(0, ROWS)
    peaks = tl.load(fold + 4).to(like_float.dtype)
    R = tl.load(fold + 6).to(tl.int32)
    for start in range(0, R, RANKS):
        rank = start + tl.arange(0, RANKS)
        scaled = _scaled(fold, row, rank, like_matrix, like_float, ALIGNED)
        tl.atomic_max(peaks + rank, tl.max(tl.abs(scaled), axis=0), mask=rank < R, sem="relaxed")


@triton.jit
def _columns_kernel(
    table: tl.tensor,
    programs: tl.tensor,
    like_matrix: tl.tensor,
    like_float: tl.tensor,
    like_columns: tl.tensor,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """hi and lo from the peaks; every program of a fold writes the same factors."""
    fold = table + tl.load(programs + tl.program_id(0) * 2) * FIELDS
    row = tl.load(programs + tl.program_id(0) * 2 + 1) * ROWS + tl.arange(0, ROWS)
    columns = tl.load(fold + 2).to(like_columns.dtype)
    factors = tl.load(fold + 3).to(like_float.dtype)
    peaks = tl.load(fold + 4).to(like_float.dtype)
    N = tl.load(fold + 5)
    R = tl.load(fold + 6).to(tl.int32)
    stride = tl.load(fold + 8)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
        stride = tl.multiple_of(stride, 16)
        R = tl.multiple_of(R, 8)
    for start in range(0, R, RANKS):
        rank = start + tl.arange(0, RANKS)
        peak = tl.load(peaks + rank, mask=rank < R, other=0.0)
        exponent = 127 - ((peak.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) + _PEAK_EXPONENT
        exponent = tl.minimum(tl.maximum(exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
        exponent = tl.where(peak > 0, exponent, 0)
        c = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(factors + rank, inverse, mask=rank < R)
        hi, lo = _halves(_scaled(fold, row, rank, like_matrix, like_float, ALIGNED) * c[None, :])
        hi = hi.to(tl.float8e4nv)
        lo = lo.to(tl.float8e4nv)
        to = columns + row.to(tl.int64)[:, None] * stride + rank[None, :]
        inside = (row < N)[:, None] & (rank < R)[None, :]
        tl.store(to, hi, mask=inside)
        tl.store(to + R, hi, mask=inside)
        tl.store(to + 2 * R, lo, mask=inside)
        tl.store(to + 3 * R, lo, mask=inside)


@triton.jit
def _scaled(
    fold: tl.tensor,
    row: tl.tensor,
    rank: tl.tensor,
    like_matrix: tl.tensor,
    like_float: tl.tensor,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """A tile of the fold's matrix over its rows' scales, float32 [rows, ranks]; 0 outside."""
    matrix = tl.load(fold).to(like_matrix.dtype)
    scale = tl.load(fold + 1).to(like_float.dtype)
    N = tl.load(fold + 5)
    R = tl.load(fold + 6)
    stride = tl.load(fold + 7)
    if ALIGNED:
        matrix = tl.multiple_of(matrix, 16)
        stride = tl.multiple_of(stride, 8)
        N = tl.multiple_of(N, 8)
        R = tl.multiple_of(R, 8)
    if tl.load(fold + 9) != 0:
        tile = tl.trans(_tile(matrix, stride, rank, R, row, N))
    else:
        tile = _tile(matrix, stride, row, N, rank, R)
    return tile.to(tl.float32) * (1.0 / tl.load(scale + row, mask=row < N, other=1.0))[:, None]


@triton.jit
def _tile(
    matrix: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
) -> tl.tensor:
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _halves(value: tl.tensor) -> tl.tuple:
    """hi and lo, as float32; nan for what is not finite, which rounding would make a number."""
    value = tl.where(tl.abs(value) < float("inf"), value, float("nan"))
    hi = value.to(tl.float8e4nv).to(tl.float32)
    return hi, (value - hi).to(tl.float8e4nv).to(tl.float32)


_PARTS = tl.constexpr(PARTS)
_PEAK_EXPONENT = tl.constexpr(PEAK_EXPONENT)
_LARGEST_EXPONENT = tl.constexpr(LARGEST_EXPONENT)
