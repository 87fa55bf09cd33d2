"""RMSNorm over the rows of a matrix, with the residual sum before it, and backward.

    rstd = 1 / sqrt(mean(x^2) + eps)        normed = x * rstd * weight

    g = dnormed * weight        dx = dresidual + rstd * (g - n * mean(g * n)),        n = x * rstd

All tensors [S, D] in one dtype, bfloat16 or float32; statistics and arithmetic float32, each result rounded
once. `add_rms_norm` rounds the sum first and normalises what it stored, so that backward, which starts from
what was stored, sees the same numbers. The weight is frozen: it gets no gradient.

One program a row, which it holds in registers: each input is read once and each output written once. Where
`quantized` is given the float32 row is also written in e4m3 (hdl/kernels/quantize.py) before it is let go.
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
    store_rowwise,
    warps_for,
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, quantized: Rowwise | None = None
) -> tuple[Tensor, Tensor]:
    """normed [S, D] in x's dtype and rstd float32 [S].

    x: [S, D]; weight: [D]; out: what to fill with `normed`; quantized: filled with normed too. x, out
    and quantized may be columns of wider matrices. ValueError for shapes, dtypes or strides that do not fit.
    """
    _, normed, rstd = _forward(x, None, weight, eps, out, quantized)
    return normed, rstd


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    quantized: Rowwise | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """total = x + branch [S, D], and what `rms_norm` of total returns: normed [S, D], rstd float32 [S]."""
    return _forward(x, branch, weight, eps, out, quantized)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantized: Rowwise | None,
) -> tuple[Tensor, Tensor, Tensor]:
    S, D = x.shape
    values_stride = check_quantized(quantized, None, S, D)
    _check_weight(weight, x)
    out = torch.empty(S, D, dtype=x.dtype, device=x.device) if out is None else out
    total = x if branch is None else torch.empty(S, D, dtype=x.dtype, device=x.device)
    rstd = torch.empty(S, dtype=torch.float32, device=x.device)
    x_stride = row_stride("x", x, (S, D), x.dtype)
    branch_stride = 0 if branch is None else row_stride("branch", branch, (S, D), x.dtype)
    out_stride = row_stride("out", out, (S, D), x.dtype)
    if not runs_triton(x):
        if branch is not None:
            total.copy_(x.float() + branch.float())
        total32 = total.float()
        torch.rsqrt(total32.square().mean(-1) + eps, out=rstd)
        normed = total32 * rstd[:, None] * weight.float()
        out.copy_(normed)
        if quantized is not None:
            quantize_rows(normed, into=quantized)
        return total, out, rstd
    block = triton.next_power_of_2(D)
    _forward_kernel[(S,)](
        x,
        branch,
        weight,
        None if branch is None else total,
        out,
        rstd,
        *parts(quantized),
        eps,
        D,
        x_stride,
        branch_stride,
        out_stride,
        values_stride,
        block,
        num_warps=warps_for(block),
    )
    return total, out, rstd


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    rstd: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BRANCH_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x_row = tl.load(x + row * X_STRIDE + columns, mask=inside, other=0.0)
    x_float = x_row.to(tl.float32)
    if branch is not None:
        branch_row = tl.load(branch + row * BRANCH_STRIDE + columns, mask=inside, other=0.0)
        rounded = (x_float + branch_row.to(tl.float32)).to(x_row.dtype)
        tl.store(total + row * D + columns, rounded, mask=inside)
        x_float = rounded.to(tl.float32)
    weight_row = tl.load(weight + columns, mask=inside, other=0.0, eviction_policy="evict_last")
    inverse = tl.rsqrt(tl.sum(x_float * x_float, axis=0) / D + eps)
    tl.store(rstd + row, inverse)
    normed = x_float * inverse * weight_row.to(tl.float32)
    tl.store(out + row * OUT_STRIDE + columns, normed.to(x_row.dtype), mask=inside)
    if values is not None:
        store_rowwise(normed, None, values, scale, row, columns, inside, VALUES_STRIDE)


def rms_norm_backward(
    dnormed: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    dresidual: Tensor | None = None,
    out: Tensor | None = None,
    quantized: Rowwise | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """dx [S, D]: the gradient through `rms_norm`, plus `dresidual`, the gradient that passes it by.

    dnormed, dresidual: [S, D]; x: [S, D], what was normalised; rstd: float32 [S], as forward returned it;
    out: what to fill, `dnormed` or `dresidual` themselves allowed; quantized: filled with dx * column_scale
    too, column_scale float32 [D]. ValueError for shapes, dtypes or strides that do not fit.
    """
    S, D = x.shape
    values_stride = check_quantized(quantized, column_scale, S, D)
    _check_weight(weight, x)
    if rstd.dtype != torch.float32 or rstd.shape != (S,) or not rstd.is_contiguous():
        raise ValueError(f"rstd is {rstd.dtype} {list(rstd.shape)}, expected contiguous torch.float32 [{S}]")
    out = torch.empty(S, D, dtype=x.dtype, device=x.device) if out is None else out
    dnormed_stride = row_stride("dnormed", dnormed, (S, D), x.dtype)
    x_stride = row_stride("x", x, (S, D), x.dtype)
    dresidual_stride = 0 if dresidual is None else row_stride("dresidual", dresidual, (S, D), x.dtype)
    out_stride = row_stride("out", out, (S, D), x.dtype)
    if not runs_triton(x):
        n = x.float() * rstd[:, None]
        g = dnormed.float() * weight.float()
        dx = rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
        dx = dx if dresidual is None else dx + dresidual.float()
        if quantized is not None:
            quantize_rows(dx, column_scale, quantized)
        return out.copy_(dx)
    block = triton.next_power_of_2(D)
    _backward_kernel[(S,)](
        dnormed,
        x,
        rstd,
        weight,
        dresidual,
        out,
        column_scale,
        *parts(quantized),
        D,
        dnormed_stride,
        x_stride,
        dresidual_stride,
        out_stride,
        values_stride,
        block,
        num_warps=warps_for(block),
    )
    return out


@triton.jit
def _backward_kernel(
    dnormed: tl.tensor,
    x: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    dresidual: tl.tensor,
    out: tl.tensor,
    column_scale: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    DNORMED_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DRESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    dnormed_row = tl.load(dnormed + row * DNORMED_STRIDE + columns, mask=inside, other=0.0)
    x_row = tl.load(x + row * X_STRIDE + columns, mask=inside, other=0.0)
    inverse = tl.load(rstd + row)
    weight_row = tl.load(weight + columns, mask=inside, other=0.0, eviction_policy="evict_last")
    n = x_row.to(tl.float32) * inverse
    g = dnormed_row.to(tl.float32) * weight_row.to(tl.float32)
    if dresidual is not None:  # loaded before the sum over the row, while the others are on their way
        past = tl.load(dresidual + row * DRESIDUAL_STRIDE + columns, mask=inside, other=0.0)
    dx = inverse * (g - n * (tl.sum(g * n, axis=0) / D))
    if dresidual is not None:
        dx += past.to(tl.float32)
    tl.store(out + row * OUT_STRIDE + columns, dx.to(x_row.dtype), mask=inside)
    if values is not None:
        store_rowwise(dx, column_scale, values, scale, row, columns, inside, VALUES_STRIDE)


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}, expected contiguous {x.dtype} {list(x.shape[1:])}"
        )
