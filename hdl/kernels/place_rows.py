"""Rows of two matrices into given rows of two others: new keys and values between those that are kept.

One program a row, both matrices in one launch. No autograd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton
from hdl.kernels.quantize import row_stride, warps_for


def place_rows(k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    """keys[rows] = k, values[rows] = v.

    k, v: [n, heads, d], heads next to each other, any row stride; rows: int64 [n], none of them twice; keys, values:
    [m, heads, d], contiguous, in k's dtype. ValueError for shapes, dtypes or strides that do not fit.
    """
    n, heads, d = k.shape
    strides = row_stride("k", k, (n, heads, d), k.dtype), row_stride("v", v, (n, heads, d), k.dtype)
    for name, into in (("keys", keys), ("values", values)):
        if into.shape[1:] != (heads, d) or into.dtype != k.dtype or not into.is_contiguous():
            raise ValueError(
                f"{name} is {into.dtype} {list(into.shape)}, expected contiguous {k.dtype} [m, {heads}, {d}]"
            )
    if rows.shape != (n,) or rows.dtype != torch.int64:
        raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}, expected torch.int64 [{n}]")
    if not runs_triton(k):
        keys.index_copy_(0, rows, k)
        values.index_copy_(0, rows, v)
        return
    width = heads * d
    block = triton.next_power_of_2(width)
    _place_kernel[(n,)](k, v, rows, keys, values, width, *strides, block, num_warps=warps_for(block))


@triton.jit
def _place_kernel(
    k: tl.tensor,
    v: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    WIDTH: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.load(rows + token)
    tl.store(keys + row * WIDTH + columns, tl.load(k + token * K_STRIDE + columns, mask=inside), mask=inside)
    tl.store(
        values + row * WIDTH + columns, tl.load(v + token * V_STRIDE + columns, mask=inside), mask=inside
    )
