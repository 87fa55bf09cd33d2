"""Row-wise e4m3 against the definition, in float64."""

import pytest
import torch

from hdl.kernels.quantize import E4M3_MAX, WEIGHT_PEAK, Rowwise, empty_rows, quantize_rows, quantize_weight
from tests.kernels.helpers import DEVICE, DTYPES, RowsSlice, assert_quantizes, draw, poisoned_rows, sliced

SHAPES = [(1, 24), (3, 136), (37, 264), (2, 12288)]

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_is_the_nearest_one(shape: tuple[int, int], scaled: bool, dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype) * draw(*shape, seed=1).exp().to(dtype)  # a wide range, some subnormal
    column_scale = draw(shape[1], seed=2).exp() * 1e-3 if scaled else None
    exact = x.double() * column_scale.double() if scaled else x.double()
    into = RowsSlice(*shape)
    got = quantize_rows(sliced(x), column_scale, into.rows)
    assert got is into.rows
    into.assert_untouched_beside()
    assert_quantizes(got, exact)
    again = quantize_rows(x, column_scale)
    assert torch.equal(again.values.view(torch.uint8), got.values.view(torch.uint8))
    assert torch.equal(again.scale, got.scale)


def test_the_same_as_a_cast_of_the_scaled_row() -> None:
    x = draw(37, 264)
    got = quantize_rows(x)
    cast = (x * (E4M3_MAX / x.abs().amax(1, keepdim=True))).to(torch.float8_e4m3fn)
    off = (got.values.view(torch.uint8).int() - cast.view(torch.uint8).int()).abs()
    assert off.max() <= 1 and (off > 0).sum() <= off.numel() / 1000  # a division may differ in its last bit


def test_every_e4m3_number_is_its_own_image() -> None:
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    got = quantize_rows(every[None])
    assert torch.equal(got.values[0].float(), every)
    assert got.dequantize().dtype == torch.float32
    torch.testing.assert_close(got.dequantize()[0], every, rtol=1e-6, atol=0.0)


def test_zero_tiny_and_huge_rows() -> None:
    x = draw(5, 40)
    x[0] = 0.0
    x[1] *= 1e-36
    x[2] *= 1e37
    x[3] = 0.0
    x[3, 7] = 1e-45
    got = quantize_rows(x)
    for row in (0, 1, 3):  # smaller than what matters: nearly or entirely 0, never nan
        assert got.values[row].float().isfinite().all() and 0 < got.scale[row] < 1e-30
        assert got.dequantize()[row].abs().max() <= 1e-31
    assert_quantizes(Rowwise(got.values[[0, 2, 4]], got.scale[[0, 2, 4]]), x[[0, 2, 4]].double())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_keeps_it_to_itself(broken: float) -> None:
    x = draw(3, 40)
    x[1, 5] = broken
    got = quantize_rows(x).dequantize()
    assert not got[1].isfinite().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_leave_room_above(dtype: torch.dtype) -> None:
    weight = draw(37, 264, dtype=dtype) * draw(37, 1, seed=1).exp().to(dtype)
    weight[3] = 0.0
    weight[5] *= 1e-6
    kept, into = weight.clone(), RowsSlice(37, 264)
    quantize_weight(weight, into.rows)
    into.assert_untouched_beside()
    assert torch.equal(weight, kept)
    peak = weight.double().abs().amax(1)
    floored = peak.clamp(min=float(peak.max()) / 16)
    torch.testing.assert_close(into.rows.scale.double(), floored / WEIGHT_PEAK, rtol=1e-5, atol=0.0)
    off = (into.rows.dequantize().double() - weight.double()).abs()
    step = 2.0**-10 * into.rows.scale.double()[:, None]  # half of the smallest there is
    assert (off <= torch.maximum(weight.double().abs() * 2.0**-4, step) * (1 + 1e-5)).all()
    assert float(into.rows.values.float().abs().max()) == WEIGHT_PEAK


def test_a_weight_of_zeros() -> None:
    into = poisoned_rows(3, 40)
    quantize_weight(torch.zeros(3, 40, device=DEVICE), into)
    assert (into.values.float() == 0).all() and (into.scale > 0).all()


def test_what_does_not_fit_is_refused() -> None:
    x = draw(3, 40)
    with pytest.raises(ValueError, match="adjacent"):
        quantize_rows(draw(40, 3).t())
    with pytest.raises(ValueError, match=r"column_scale is .*\[39\]"):
        quantize_rows(x, draw(39))
    with pytest.raises(ValueError, match=r"quantized.values is .*\[3, 48\]"):
        quantize_rows(x, into=empty_rows(3, 48, DEVICE))
    with pytest.raises(ValueError, match=r"quantized.scale is .*\[4\]"):
        quantize_rows(x, into=Rowwise(empty_rows(3, 40, DEVICE).values, torch.ones(4, device=DEVICE)))
