"""Rows arrive where they are told, and no other row is touched."""

import pytest
import torch

from hdl.kernels.place_rows import place_rows
from tests.kernels.helpers import DEVICE, DTYPES, draw, sliced


@pytest.fixture(autouse=True, params=["kernel", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr("hdl.kernels.place_rows.runs_triton", lambda tensor: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2, 16), (3, 3, 10), (1, 1, 8)])
def test_rows_and_no_others(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    k, v = draw(*shape, dtype=dtype, seed=1), sliced(draw(*shape, dtype=dtype, seed=2))
    keys, values = torch.full((2, 9, *shape[1:]), torch.nan, device=DEVICE, dtype=dtype)
    rows = torch.tensor([7, 0, 8, 3, 4][: shape[0]], device=DEVICE)
    place_rows(k, v, rows, keys, values)
    assert torch.equal(keys[rows], k) and torch.equal(values[rows], v)
    for into in (keys, values):
        assert into.isnan().sum() == into.numel() - k.numel()


def test_what_does_not_fit() -> None:
    k, rows = draw(2, 2, 4), torch.tensor([0, 1], device=DEVICE)
    into = draw(3, 2, 4)
    for wrong, message in (
        ((k, k[:1], rows, into, into), "v is"),
        ((k, k, rows.int(), into, into), "rows is torch.int32"),
        ((k, k, rows[:1], into, into), r"rows is torch.int64 \[1\]"),
        ((k, k, rows, into.bfloat16(), into), "keys is torch.bfloat16"),
        ((k, k, rows, into, draw(3, 4, 4)[:, ::2]), "values is .* expected contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            place_rows(*wrong)
