"""Per-head norm and rotary, forward and backward, against autograd of the formula in float64."""

import pytest
import torch
from torch import Tensor

from hdl.kernels.head_norm_rotary import head_norm_rotary, head_norm_rotary_backward
from hdl.o1.decoder import RMSNorm, rotate
from tests.kernels.helpers import (
    DTYPES,
    RowsSlice,
    Slice,
    assert_close,
    assert_quantizes,
    draw,
    gradients,
    poisoned_rows,
    sliced,
)

EPS = 1e-6
# tokens, query heads, kv heads, numbers a head
SHAPES = [(1, 1, 1, 16), (3, 4, 2, 24), (37, 5, 1, 16), (3, 2, 2, 128), (2, 32, 8, 128)]

pytestmark = pytest.mark.usefixtures("path")
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def formula(raw: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """One projection's heads [S, heads, d], as the decoder's docstrings have it."""
    normed = raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + EPS) * weight
    return rotate(normed, twice(cos, sin))


def plain(raw: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """The decoder's own, in its own dtype."""
    norm = RMSNorm(raw.shape[-1], EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return rotate(norm(raw), twice(cos.to(raw.dtype), sin.to(raw.dtype)))


def twice(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


class Case:
    """Random inputs of one shape: a fused projection, its heads apart, angles and weights."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.S, self.heads, self.kv_heads, self.d = S, heads, kv_heads, d = shape
        self.width = (heads + 2 * kv_heads) * d
        self.qkv = draw(S, self.width, dtype=dtype, seed=1, scale=2.0)
        angles = draw(S, d // 2, seed=2, scale=3.0)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.weights = [(1 + draw(d, seed=seed, scale=0.3)).to(dtype) for seed in (3, 4)]
        self.upstream = [draw(S, n, d, dtype=dtype, seed=5 + n) for n in (heads, kv_heads, kv_heads)]

    @property
    def raw(self) -> list[Tensor]:
        q, k, v = self.qkv.unflatten(1, (-1, self.d)).split((self.heads, self.kv_heads, self.kv_heads), 1)
        return [q, k, v]

    def exact(self) -> list[Tensor]:
        cos, sin = self.cos.double(), self.sin.double()
        return [formula(x.double(), cos, sin, w.double()) for x, w in zip(self.raw, self.weights)]

    def plain(self) -> list[Tensor]:
        return [plain(x, self.cos, self.sin, w) for x, w in zip(self.raw, self.weights)]

    def exact_gradients(self) -> list[Tensor]:
        """Of raw q, k and v, each [S, heads, d]."""
        cos, sin = self.cos.double(), self.sin.double()
        turned = [
            gradients(lambda x, w=w: formula(x, cos, sin, w), [x.double()], dy.double())[0]  # type: ignore[misc]
            for x, w, dy in zip(self.raw, [w.double() for w in self.weights], self.upstream)
        ]
        return [*turned, self.upstream[2].double()]

    def plain_gradients(self) -> list[Tensor]:
        turned = [
            gradients(lambda x, w=w: plain(x, self.cos, self.sin, w), [x], dy)[0]  # type: ignore[misc]
            for x, w, dy in zip(self.raw, self.weights, self.upstream)
        ]
        return [*turned, self.upstream[2]]

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        return head_norm_rotary(qkv, self.cos, self.sin, *self.weights, EPS, self.heads, self.kv_heads)

    def backward(self, upstream: list[Tensor], qkv: Tensor, **into: object) -> Tensor:
        return head_norm_rotary_backward(*upstream, qkv, self.cos, self.sin, *self.weights, EPS, **into)  # type: ignore[arg-type]


def joined(heads: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in heads], dim=1)


@over_dtypes
@over_shapes
def test_forward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    for qkv in (case.qkv, sliced(case.qkv)):
        for got, exact, close in zip(case.forward(qkv), case.exact(), case.plain()):
            assert got.is_contiguous()
            assert_close(got, exact, close)


@over_dtypes
@over_shapes
def test_backward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    column_scale = draw(case.width, seed=9).exp()
    exact, close = case.exact_gradients(), case.plain_gradients()
    out, beside = Slice(case.S, case.width, dtype), RowsSlice(case.S, case.width)
    rows = beside.rows
    got = case.backward(
        [sliced(x) for x in case.upstream], sliced(case.qkv),
        out=out.view, quantized=rows, column_scale=column_scale,
    )  # fmt: skip
    assert got.data_ptr() == out.view.data_ptr()
    out.assert_untouched_beside()
    beside.assert_untouched_beside()
    counts = (case.heads, case.kv_heads, case.kv_heads)
    parts = got.unflatten(1, (-1, case.d)).split(counts, dim=1)
    for part, wanted, plainly in zip(parts, exact, close):
        assert_close(part, wanted, plainly)
    assert torch.equal(parts[2], case.upstream[2])
    assert_quantizes(rows, joined(exact) * column_scale.double())

    assert_close(case.backward(case.upstream, case.qkv), joined(exact), joined(close))
    case.backward(case.upstream, case.qkv, quantized=rows)
    assert_quantizes(rows, joined(exact))


def test_one_part_may_hold_the_largest_of_the_row() -> None:
    case = Case((3, 4, 2, 16), torch.float32)
    for part in range(3):
        upstream = [x * (1000.0 if i == part else 1.0) for i, x in enumerate(case.upstream)]
        rows = poisoned_rows(case.S, case.width)
        got = case.backward(upstream, case.qkv, quantized=rows)
        assert_quantizes(rows, got.double())


@over_dtypes
def test_heads_of_zeros_and_of_huge_numbers(dtype: torch.dtype) -> None:
    case = Case((3, 4, 2, 16), dtype)
    case.qkv[0] = 0.0
    case.qkv[1] *= 1e15
    for got, exact, close in zip(case.forward(case.qkv), case.exact(), case.plain()):
        assert_close(got, exact, close)
    rows = poisoned_rows(case.S, case.width)
    got, exact = case.backward(case.upstream, case.qkv, quantized=rows), joined(case.exact_gradients())
    for row in range(3):  # each by itself: at zero the gradient is a thousand times that elsewhere
        assert_close(got[row], exact[row], joined(case.plain_gradients())[row])
    assert_quantizes(rows, exact)


def test_gradients_of_zero() -> None:
    case = Case((3, 4, 2, 16), torch.bfloat16)
    rows = poisoned_rows(case.S, case.width)
    got = case.backward([torch.zeros_like(x) for x in case.upstream], case.qkv, quantized=rows)
    assert (got == 0).all()
    assert_quantizes(rows, got.double())


def test_what_does_not_fit_is_refused() -> None:
    case = Case((3, 4, 2, 16), torch.float32)
    with pytest.raises(ValueError, match=r"qkv is .*\[3, 112\], expected .*\[3, 128\]"):
        case.forward(case.qkv[:, :112])
    with pytest.raises(ValueError, match="dk has strides"):
        dq, dk, dv = case.upstream
        case.backward([dq, dk.transpose(1, 2).contiguous().transpose(1, 2), dv], case.qkv)
    case.cos = case.cos.bfloat16()
    with pytest.raises(ValueError, match="cos is torch.bfloat16"):
        case.forward(case.qkv)
