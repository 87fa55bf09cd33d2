"""RMSNorm with its residual, forward and backward, against autograd of the formula in float64."""

import pytest
import torch
from torch import Tensor

from hdl.kernels.quantize import Rowwise
from hdl.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from hdl.o1.decoder import RMSNorm
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
SHAPES = [(1, 24), (3, 136), (37, 264), (2, 4096)]

pytestmark = pytest.mark.usefixtures("path")
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """The decoder's own, in its own dtype."""
    norm = RMSNorm(x.shape[1], EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


def weight_of(columns: int, dtype: torch.dtype) -> Tensor:
    return (1.0 + draw(columns, seed=9, scale=0.3)).to(dtype)


@over_dtypes
@over_shapes
def test_forward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype, scale=3.0), weight_of(shape[1], dtype)
    exact = formula(x.double(), weight.double())
    out, rows = Slice(*shape, dtype), RowsSlice(*shape)
    normed, rstd = rms_norm(sliced(x), weight, EPS, out=out.view, quantized=rows.rows)
    assert normed.data_ptr() == out.view.data_ptr()
    out.assert_untouched_beside()
    rows.assert_untouched_beside()
    assert_close(normed, exact, plain(x, weight))
    assert_close(rstd, torch.rsqrt(x.double().square().mean(1) + EPS))
    assert_quantizes(rows.rows, exact)
    assert_close(rms_norm(x, weight, EPS)[0], exact, plain(x, weight))


@over_dtypes
@over_shapes
def test_forward_with_the_residual_sum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, branch = (draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = weight_of(shape[1], dtype)
    out, rows = Slice(*shape, dtype), RowsSlice(*shape)
    total, normed, rstd = add_rms_norm(
        sliced(x), sliced(branch), weight, EPS, out=out.view, quantized=rows.rows
    )
    assert torch.equal(total, x + branch)
    out.assert_untouched_beside()
    rows.assert_untouched_beside()
    exact = formula(total.double(), weight.double())  # of the rounded sum: backward starts from it too
    assert_close(normed, exact, plain(x + branch, weight))
    assert_close(rstd, torch.rsqrt(total.double().square().mean(1) + EPS))
    assert_quantizes(rows.rows, exact)
    again = add_rms_norm(x, branch, weight, EPS)
    assert torch.equal(again[0], total)
    assert_close(again[1], exact, plain(x + branch, weight))


@over_dtypes
@pytest.mark.parametrize("residual", [False, True])
@over_shapes
def test_backward(shape: tuple[int, int], residual: bool, dtype: torch.dtype) -> None:
    x, dnormed, past = (draw(*shape, dtype=dtype, seed=seed) for seed in (3, 4, 5))
    weight, column_scale = weight_of(shape[1], dtype), draw(shape[1], seed=6).exp()
    [exact] = gradients(lambda v: formula(v, weight.double()), [x.double()], dnormed.double())
    [close] = gradients(lambda v: plain(v, weight), [x], dnormed)
    if residual:
        exact, close = exact + past.double(), close + past
    rstd = torch.rsqrt(x.double().square().mean(1) + EPS).float()
    out, rows = Slice(*shape, dtype), RowsSlice(*shape)
    dx = rms_norm_backward(
        sliced(dnormed), sliced(x), rstd, weight, dresidual=sliced(past) if residual else None,
        out=out.view, quantized=rows.rows, column_scale=column_scale,
    )  # fmt: skip
    assert dx.data_ptr() == out.view.data_ptr()
    out.assert_untouched_beside()
    rows.assert_untouched_beside()
    assert_close(dx, exact, close)
    assert_quantizes(rows.rows, exact * column_scale.double())
    again = rms_norm_backward(dnormed, x, rstd, weight, dresidual=past if residual else None)
    assert_close(again, exact, close)


@over_dtypes
def test_backward_in_place(dtype: torch.dtype) -> None:
    x, dnormed, past = (draw(3, 136, dtype=dtype, seed=seed) for seed in (3, 4, 5))
    weight = weight_of(136, dtype)
    rstd = rms_norm(x, weight, EPS)[1]
    apart = rms_norm_backward(dnormed, x, rstd, weight, dresidual=past)
    for into in (dnormed.clone(), past.clone()):
        given = [into if torch.equal(into, g) else g for g in (dnormed, past)]
        assert torch.equal(rms_norm_backward(given[0], x, rstd, weight, dresidual=given[1], out=into), apart)


@over_dtypes
def test_rows_of_zeros_and_of_huge_numbers(dtype: torch.dtype) -> None:
    x, dnormed = draw(3, 136, dtype=dtype), draw(3, 136, dtype=dtype, seed=1)
    x[0] = 0.0
    x[1] *= 1e15
    weight = weight_of(136, dtype)
    rows = poisoned_rows(3, 136)
    normed, rstd = rms_norm(x, weight, EPS, quantized=rows)
    assert_close(normed, formula(x.double(), weight.double()), plain(x, weight))
    assert_quantizes(rows, formula(x.double(), weight.double()))
    dx = rms_norm_backward(dnormed, x, rstd, weight)
    [exact] = gradients(lambda v: formula(v, weight.double()), [x.double()], dnormed.double())
    [close] = gradients(lambda v: plain(v, weight), [x], dnormed)
    for row in range(3):  # each by itself: the zero row's gradient is a thousand times any other's
        assert_close(dx[row], exact[row], close[row])


def test_what_does_not_fit_is_refused() -> None:
    x, weight = draw(3, 40), weight_of(40, torch.float32)
    rstd = rms_norm(x, weight, EPS)[1]
    with pytest.raises(ValueError, match="branch is torch.bfloat16"):
        add_rms_norm(x, x.bfloat16(), weight, EPS)
    with pytest.raises(ValueError, match=r"out is .*\[3, 48\]"):
        rms_norm(x, weight, EPS, out=draw(3, 48))
    with pytest.raises(ValueError, match="weight is torch.bfloat16"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="dnormed has strides"):
        rms_norm_backward(draw(40, 3).t(), x, rstd, weight)
    with pytest.raises(ValueError, match="pass `quantized`"):
        rms_norm_backward(x, x, rstd, weight, column_scale=draw(40))
    with pytest.raises(ValueError, match="quantized"):
        rms_norm(x, weight, EPS, quantized=Rowwise(*poisoned_rows(4, 40).__dict__.values()))
