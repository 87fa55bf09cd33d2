"""The gated unit, forward and backward, against autograd of the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hdl.kernels.swiglu import swiglu, swiglu_backward
from tests.kernels.helpers import (
    DEVICE,
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

SHAPES = [(1, 24), (3, 136), (37, 264), (2, 4104), (1, 12288)]  # the last two take several steps a row

pytestmark = pytest.mark.usefixtures("path")
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def formula(gate_up: Tensor) -> Tensor:
    """The decoder's own, in any dtype."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


@over_dtypes
@over_shapes
def test_forward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    S, M = shape
    gate_up = draw(S, 2 * M, dtype=dtype, scale=3.0)
    exact = formula(gate_up.double())
    for rows in (None, RowsSlice(S, M)):
        out = Slice(S, M, dtype)
        got = swiglu(sliced(gate_up), out=out.view, quantized=rows and rows.rows)
        assert got.data_ptr() == out.view.data_ptr()
        out.assert_untouched_beside()
        assert_close(got, exact, formula(gate_up))
        if rows is not None:
            rows.assert_untouched_beside()
            assert_quantizes(rows.rows, exact)
    assert_close(swiglu(gate_up), exact, formula(gate_up))


@over_dtypes
@pytest.mark.parametrize("quantize", ["no", "yes", "scaled"])
@over_shapes
def test_backward(shape: tuple[int, int], quantize: str, dtype: torch.dtype) -> None:
    S, M = shape
    gate_up, dh = draw(S, 2 * M, dtype=dtype, seed=1, scale=3.0), draw(S, M, dtype=dtype, seed=2)
    column_scale = draw(2 * M, seed=3).exp() if quantize == "scaled" else None
    beside = RowsSlice(S, 2 * M)
    rows = None if quantize == "no" else beside.rows
    [exact] = gradients(formula, [gate_up.double()], dh.double())
    [close] = gradients(formula, [gate_up], dh)
    out, h = Slice(S, 2 * M, dtype), Slice(S, M, dtype)
    got = swiglu_backward(
        sliced(dh), sliced(gate_up), out=out.view, h=h.view, quantized=rows, column_scale=column_scale
    )
    assert got.data_ptr() == out.view.data_ptr()
    for given in (out, h, beside):
        given.assert_untouched_beside()
    assert_close(h.view, formula(gate_up.double()), formula(gate_up))
    for half, wanted, plainly in zip(got.chunk(2, 1), exact.chunk(2, 1), close.chunk(2, 1)):
        assert_close(half, wanted, plainly)
    if rows is not None:
        assert_quantizes(rows, exact if column_scale is None else exact * column_scale.double())
    if quantize != "scaled":
        assert_close(swiglu_backward(dh, gate_up, quantized=rows), exact, close)


@over_dtypes
def test_many_rows_of_several_pieces(dtype: torch.dtype) -> None:
    S, M = 661 if DEVICE.type == "cuda" else 11, 4104
    row_size = torch.logspace(-3, 3, S, dtype=torch.float64, device=DEVICE)[:, None]  # none fits a neighbour
    gate_up, dh = draw(S, 2 * M, dtype=dtype, seed=4), (draw(S, M, seed=5) * row_size).to(dtype)
    gate_up[:, M:] *= row_size.to(dtype)
    column_scale = draw(2 * M, seed=6).exp()
    rows, dgate_up_rows = poisoned_rows(S, M), poisoned_rows(S, 2 * M)
    exact = formula(gate_up.double())
    [exact_gradient] = gradients(formula, [gate_up.double()], dh.double())
    [close_gradient] = gradients(formula, [gate_up], dh)
    out, h = Slice(S, 2 * M, dtype), Slice(S, M, dtype)
    swiglu_backward(
        sliced(dh),
        sliced(gate_up),
        out=out.view,
        h=h.view,
        quantized=dgate_up_rows,
        column_scale=column_scale,
    )
    for got in (h.view, swiglu(sliced(gate_up), quantized=rows)):
        assert_close(got, exact, formula(gate_up))
    assert_close(out.view, exact_gradient, close_gradient)
    assert_quantizes(rows, exact)
    assert_quantizes(dgate_up_rows, exact_gradient * column_scale.double())


def test_one_half_may_hold_the_largest_of_the_row() -> None:
    gate_up, dh = draw(3, 48), draw(3, 24)
    for half in (slice(24), slice(24, 48)):
        column_scale = torch.ones(48, device=dh.device)
        column_scale[half] = 1000.0
        rows = poisoned_rows(3, 48)
        got = swiglu_backward(dh, gate_up, quantized=rows, column_scale=column_scale)
        assert_quantizes(rows, got.double() * column_scale.double())


@over_dtypes
def test_zeros_and_huge_numbers(dtype: torch.dtype) -> None:
    gate_up, dh = draw(4, 272, dtype=dtype), draw(4, 136, dtype=dtype, seed=1)
    gate_up[0] = 0.0
    gate_up[1, :136] *= 1e20  # silu is 0 or the gate itself, its slope 0 or 1
    gate_up[2] *= 1e-10
    dh[3] = 0.0
    rows, dgate_up_rows = poisoned_rows(4, 136), poisoned_rows(4, 272)
    exact = formula(gate_up.double())
    [exact_gradient] = gradients(formula, [gate_up.double()], dh.double())
    [close_gradient] = gradients(formula, [gate_up], dh)
    got = swiglu(gate_up, quantized=rows)
    gradient = swiglu_backward(dh, gate_up, quantized=dgate_up_rows)
    for row in range(4):
        assert_close(got[row], exact[row], formula(gate_up)[row])
        assert_close(gradient[row], exact_gradient[row], close_gradient[row])
    assert_quantizes(rows, exact)
    assert_quantizes(dgate_up_rows, exact_gradient)


def test_what_does_not_fit_is_refused() -> None:
    gate_up, dh = draw(3, 80), draw(3, 40)
    with pytest.raises(ValueError, match="out is torch.bfloat16"):
        swiglu(gate_up, out=dh.bfloat16())
    with pytest.raises(ValueError, match=r"gate_up is .*\[3, 72\], expected .*\[3, 80\]"):
        swiglu_backward(dh, gate_up[:, :72])
    with pytest.raises(ValueError, match="h has strides"):
        swiglu_backward(dh, gate_up, h=draw(40, 3).t())
    with pytest.raises(ValueError, match=r"quantized.values is .*\[3, 40\]"):
        swiglu_backward(dh, gate_up, quantized=poisoned_rows(3, 40))
