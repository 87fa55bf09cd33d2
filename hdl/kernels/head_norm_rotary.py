"""Queries and keys made ready for attention: RMSNorm over each head, then rotary; and backward.

    n = x / sqrt(mean(x^2) + eps) * weight          of each head, d numbers, halves n1 and n2
    y = (n1 cos - n2 sin, n2 cos + n1 sin)          cos, sin: one each of d/2 angles of the token

Input is the fused projection qkv [S, (heads + 2 kv_heads) d]: query heads, then key heads, then value heads.
Values pass untouched: attention reads them where they are. Backward gathers the three gradients into one
matrix laid out like qkv, ready for the projection's backward, and computes the statistics again: a head is in
registers anyway. bfloat16 or float32; cos, sin, statistics and arithmetic float32, each result rounded once.

One program a token. A head's two halves are loaded as two tiles [heads, d/2], so that rotating needs no
exchange between threads.
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
    warps_for,
)


def head_norm_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """q [S, heads, d] and k [S, kv_heads, d], contiguous, in qkv's dtype.

    qkv: [S, (heads + 2 * kv_heads) * d], any row stride; cos, sin: float32 [S, d/2], contiguous;
    q_weight, k_weight: [d]. ValueError for shapes, dtypes or strides that do not fit.
    """
    S, d = qkv.shape[0], q_weight.shape[0]
    q = torch.empty(S, heads, d, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty(S, kv_heads, d, dtype=qkv.dtype, device=qkv.device)
    stride = row_stride("qkv", qkv, (S, (heads + 2 * kv_heads) * d), qkv.dtype)
    _check_angles(cos, sin, S, d)
    _check_weights(q_weight, k_weight, d, qkv.dtype)
    if not runs_triton(qkv):
        raw_q, raw_k, _ = _split(qkv, heads, kv_heads)
        q.copy_(_turn(_normed(raw_q, eps)[0] * q_weight.float(), cos, sin))
        k.copy_(_turn(_normed(raw_k, eps)[0] * k_weight.float(), cos, sin))
        return q, k
    blocks = _blocks(heads, kv_heads, d)
    _forward_kernel[(S,)](
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        q,
        k,
        eps,
        heads,
        kv_heads,
        d,
        stride,
        *blocks,
        num_warps=warps_for(blocks[0] * blocks[2]),
    )
    return q, k


@triton.jit
def _forward_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    d: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    raw = qkv + token * STRIDE
    _forward_heads(raw, cos, sin, q_weight, q, token, eps, HEADS, d, HEADS_BLOCK, HALF_BLOCK)
    raw += HEADS * d
    _forward_heads(raw, cos, sin, k_weight, k, token, eps, KV_HEADS, d, KV_HEADS_BLOCK, HALF_BLOCK)


@triton.jit
def _forward_heads(
    raw: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    token: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    d: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    HALF: tl.constexpr = d // 2
    first, inside = _first_half(HEADS, d, HEADS_BLOCK, HALF_BLOCK)
    x1 = tl.load(raw + first, mask=inside, other=0.0)
    x2 = tl.load(raw + first + HALF, mask=inside, other=0.0)
    c, s, w1, w2 = _of_token(cos, sin, weight, token, HALF, HALF_BLOCK)
    n1, n2, _ = _normed_halves(x1, x2, eps, d)
    n1 *= w1
    n2 *= w2
    out += token * HEADS * d
    tl.store(out + first, (n1 * c - n2 * s).to(x1.dtype), mask=inside)
    tl.store(out + first + HALF, (n2 * c + n1 * s).to(x1.dtype), mask=inside)


def head_norm_rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    quantized: Rowwise | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """dqkv [S, (heads + 2 * kv_heads) * d], laid out like qkv.

    dq: [S, heads, d]; dk, dv: [S, kv_heads, d], heads next to each other, any row stride; qkv and what
    follows it: as given to forward; out: what to fill; quantized: filled with dqkv * column_scale too,
    column_scale float32 [dqkv's width]. ValueError for shapes, dtypes or strides that do not fit.
    """
    (S, heads, d), kv_heads = dq.shape, dk.shape[1]
    width = (heads + 2 * kv_heads) * d
    values_stride = check_quantized(quantized, column_scale, S, width)
    out = torch.empty(S, width, dtype=qkv.dtype, device=qkv.device) if out is None else out
    strides = (
        row_stride("dq", dq, (S, heads, d), qkv.dtype),
        row_stride("dk", dk, (S, kv_heads, d), qkv.dtype),
        row_stride("dv", dv, (S, kv_heads, d), qkv.dtype),
        row_stride("qkv", qkv, (S, width), qkv.dtype),
        row_stride("out", out, (S, width), qkv.dtype),
    )
    _check_angles(cos, sin, S, d)
    _check_weights(q_weight, k_weight, d, qkv.dtype)
    if not runs_triton(qkv):
        raw_q, raw_k, _ = _split(qkv, heads, kv_heads)
        dqkv = torch.cat(
            [
                _backward_plain(dq, raw_q, cos, sin, q_weight, eps).flatten(1),
                _backward_plain(dk, raw_k, cos, sin, k_weight, eps).flatten(1),
                dv.float().flatten(1),
            ],
            dim=1,
        )
        if quantized is not None:
            quantize_rows(dqkv, column_scale, quantized)
        return out.copy_(dqkv)
    blocks = _blocks(heads, kv_heads, d)
    _backward_kernel[(S,)](
        dq,
        dk,
        dv,
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        out,
        column_scale,
        *parts(quantized),
        eps,
        heads,
        kv_heads,
        d,
        *strides,
        values_stride,
        *blocks,
        triton.next_power_of_2(kv_heads * d),
        num_warps=warps_for(2 * blocks[0] * blocks[2]),
    )
    return out


@triton.jit
def _backward_kernel(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    out: tl.tensor,
    column_scale: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    d: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    DK_STRIDE: tl.constexpr,
    DV_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    VALUES_BLOCK: tl.constexpr,
) -> None:
    HALF: tl.constexpr = d // 2
    K_START: tl.constexpr = HEADS * d
    V_START: tl.constexpr = (HEADS + KV_HEADS) * d
    token = tl.program_id(0).to(tl.int64)
    dq += token * DQ_STRIDE
    dk += token * DK_STRIDE
    dv += token * DV_STRIDE
    qkv += token * STRIDE
    out += token * OUT_STRIDE

    q_first, q_inside = _first_half(HEADS, d, HEADS_BLOCK, HALF_BLOCK)
    k_first, k_inside = _first_half(KV_HEADS, d, KV_HEADS_BLOCK, HALF_BLOCK)
    v_columns = tl.arange(0, VALUES_BLOCK)
    v_inside = v_columns < KV_HEADS * d
    v = tl.load(dv + v_columns, mask=v_inside, other=0.0)
    tl.store(out + V_START + v_columns, v, mask=v_inside)
    q1, q2 = _backward_heads(dq, qkv, cos, sin, q_weight, token, eps, q_first, q_inside, d, HALF_BLOCK)
    tl.store(out + q_first, q1.to(v.dtype), mask=q_inside)
    tl.store(out + q_first + HALF, q2.to(v.dtype), mask=q_inside)
    k1, k2 = _backward_heads(
        dk, qkv + K_START, cos, sin, k_weight, token, eps, k_first, k_inside, d, HALF_BLOCK
    )
    k_first += K_START
    v_columns += V_START
    tl.store(out + k_first, k1.to(v.dtype), mask=k_inside)
    tl.store(out + k_first + HALF, k2.to(v.dtype), mask=k_inside)

    if values is not None:
        v = v.to(tl.float32)
        if column_scale is not None:
            q1 *= tl.load(column_scale + q_first, mask=q_inside, other=0.0)
            q2 *= tl.load(column_scale + q_first + HALF, mask=q_inside, other=0.0)
            k1 *= tl.load(column_scale + k_first, mask=k_inside, other=0.0)
            k2 *= tl.load(column_scale + k_first + HALF, mask=k_inside, other=0.0)
            v *= tl.load(column_scale + v_columns, mask=v_inside, other=0.0)
        q_peak = tl.max(tl.max(tl.maximum(tl.abs(q1), tl.abs(q2)), axis=1), axis=0)
        k_peak = tl.max(tl.max(tl.maximum(tl.abs(k1), tl.abs(k2)), axis=1), axis=0)
        peak = tl.maximum(tl.maximum(q_peak, k_peak), tl.max(tl.abs(v), axis=0))
        tl.store(scale + token, scale_of(peak))
        values += token * VALUES_STRIDE
        tl.store(values + q_first, to_e4m3(q1, peak), mask=q_inside)
        tl.store(values + q_first + HALF, to_e4m3(q2, peak), mask=q_inside)
        tl.store(values + k_first, to_e4m3(k1, peak), mask=k_inside)
        tl.store(values + k_first + HALF, to_e4m3(k2, peak), mask=k_inside)
        tl.store(values + v_columns, to_e4m3(v, peak), mask=v_inside)


@triton.jit
def _backward_heads(
    dy: tl.tensor,
    raw: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    token: tl.tensor,
    eps: tl.tensor,
    first: tl.tensor,
    inside: tl.tensor,
    d: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> tl.tensor:
    """The gradient of one token's raw heads, float32, as two tiles [heads, d/2]; 0 outside of the mask."""
    HALF: tl.constexpr = d // 2
    dy1 = tl.load(dy + first, mask=inside, other=0.0).to(tl.float32)
    dy2 = tl.load(dy + first + HALF, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(raw + first, mask=inside, other=0.0)
    x2 = tl.load(raw + first + HALF, mask=inside, other=0.0)
    c, s, w1, w2 = _of_token(cos, sin, weight, token, HALF, HALF_BLOCK)
    n1, n2, rstd = _normed_halves(x1, x2, eps, d)
    g1 = (dy1 * c + dy2 * s) * w1
    g2 = (dy2 * c - dy1 * s) * w2
    mean = tl.sum(g1 * n1 + g2 * n2, axis=1)[:, None] / d
    return rstd * (g1 - n1 * mean), rstd * (g2 - n2 * mean)


@triton.jit
def _first_half(
    HEADS: tl.constexpr, d: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr
) -> tl.tensor:
    """Where the first halves of adjacent heads lie, [HEADS_BLOCK, HALF_BLOCK], and which of them are any."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    return head * d + column, (head < HEADS) & (column < d // 2)


@triton.jit
def _of_token(
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    token: tl.tensor,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> tl.tensor:
    """cos, sin and the two halves of the weight, float32, each a row [1, d/2]."""
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = column < HALF
    c = tl.load(cos + token * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=inside, other=0.0)
    w1 = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
    return c, s, w1, w2


@triton.jit
def _normed_halves(x1: tl.tensor, x2: tl.tensor, eps: tl.tensor, d: tl.constexpr) -> tl.tensor:
    """Both halves over the root mean square of their head, and one over that, [heads, 1]."""
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1)[:, None] / d + eps)
    return x1 * rstd, x2 * rstd, rstd


def _blocks(heads: int, kv_heads: int, d: int) -> tuple[int, int, int]:
    """Powers of two that hold the query heads, the key heads and half a head."""
    heads_block, kv_heads_block, half_block = (triton.next_power_of_2(n) for n in (heads, kv_heads, d // 2))
    return heads_block, kv_heads_block, half_block


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Raw q, k and v, float32 [S, heads or kv_heads, d]."""
    d = qkv.shape[1] // (heads + 2 * kv_heads)
    return qkv.float().unflatten(1, (-1, d)).split((heads, kv_heads, kv_heads), dim=1)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _turn(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n1, n2 = n.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([n1 * cos - n2 * sin, n2 * cos + n1 * sin], dim=-1)


def _backward_plain(dy: Tensor, raw: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float) -> Tensor:
    n, rstd = _normed(raw, eps)
    g = _turn(dy.float(), cos, -sin) * weight.float()
    return rstd * (g - n * (g * n).mean(-1, keepdim=True))


def _check_angles(cos: Tensor, sin: Tensor, S: int, d: int) -> None:
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (S, d // 2) or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)}, expected contiguous torch.float32 [{S}, {d // 2}]"
            )


def _check_weights(q_weight: Tensor, k_weight: Tensor, d: int, dtype: torch.dtype) -> None:
    for name, x in (("q_weight", q_weight), ("k_weight", k_weight)):
        if x.shape != (d,) or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, expected contiguous {dtype} [{d}]")
