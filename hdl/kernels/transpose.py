"""out = x^T for numbers of one byte: x [N, K] -> out [K, N], one read and one write of each.

PyTorch's own transposing copy of bytes reads or writes them one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton
from hdl.kernels.quantize import row_stride

TILE = 128


def transpose(x: Tensor, out: Tensor) -> None:
    """x: [N, K], out: [K, N], float8_e4m3fn, elements of a row adjacent, any row stride. ValueError if not."""
    N, K = x.shape
    x_stride = row_stride("x", x, (N, K), torch.float8_e4m3fn)
    out_stride = row_stride("out", out, (K, N), torch.float8_e4m3fn)
    if not runs_triton(x):
        out.copy_(x.t())
        return
    grid = (triton.cdiv(N, TILE), triton.cdiv(K, TILE))
    _transpose_kernel[grid](
        x.view(torch.uint8), out.view(torch.uint8), N, K, x_stride, out_stride, TILE, num_warps=8
    )


@triton.jit
def _transpose_kernel(
    x: tl.tensor,
    out: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    tile = tl.load(x + n[:, None] * X_STRIDE + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
    inside = (k < K)[:, None] & (n < N)[None, :]
    tl.store(out + k[:, None] * OUT_STRIDE + n[None, :], tl.trans(tile), mask=inside)
