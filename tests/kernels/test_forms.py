"""Forms of frozen weights beside the ones of test_linears.py, and what they share."""

import pytest
import torch
from torch import Tensor, nn

from hdl.kernels.fuse import FORMS
from hdl.kernels.linears import Fp8Linear, PackedLinear
from hdl.kernels.quantize import quantize_rows
from hdl.kernels.restored import Fp8MovingLinear
from hdl.kernels.scratch import Scratch
from hdl.kernels.transpose import transpose
from tests.kernels.helpers import DEVICE, draw

N, K, TOKENS = (48, 32), 64, 10


def modules(seed: int = 0) -> list[nn.Module]:
    found: list[nn.Module] = []
    for i, rows in enumerate(N):
        linear = nn.Linear(K, rows, bias=False, device=DEVICE).requires_grad_(False)
        linear.weight.data = draw(rows, K, seed=seed + i, scale=K**-0.5)
        found.append(linear)
    return found


def both_ways(linear: PackedLinear, x: Tensor, dy: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
    into, back = linear.input_buffer(len(x)), linear.gradient_buffer(len(x))
    for buffer, values, scale in ((into, x, None), (back, dy, linear.gradient_scale)):
        buffer.values.copy_(values)
        if buffer.rows is not None:
            quantize_rows(buffer.values, column_scale=scale, into=buffer.rows)
    linear.lower_input(into)
    linear.lower_gradient(back)
    return linear.forward(into, plus), linear.backward(back)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(TOKENS, K, seed=seed),
        draw(TOKENS, sum(N), seed=seed + 1),
        draw(TOKENS, sum(N), seed=seed + 2),
    )


def test_one_copy_of_e4m3_weights_gives_what_two_give() -> None:
    scratch = Scratch()
    twice, once = Fp8Linear(modules()), Fp8Linear(modules(), scratch)
    other = Fp8Linear(modules(seed=7), scratch)
    expected = both_ways(twice, *inputs())
    both_ways(other, *inputs(1))  # takes the scratch in between
    for got, wanted in zip(both_ways(once, *inputs()), expected):
        assert torch.equal(got, wanted)
    assert once._kept.values.numel() == 0 and twice._kept.values.numel() == sum(N) * K


@pytest.mark.parametrize(("form", "furthest"), [("fp8_stored", 0.03), ("nf4", 0.11)])
def test_restored_weights_are_multiplied_in_their_dtype(form: str, furthest: float) -> None:
    """Beside the rounding of the weights there is none."""
    made = modules()
    weight = torch.cat([m.weight.clone() for m in made])  # type: ignore[operator]
    scratch = Scratch()
    linear, other = FORMS[form](made, scratch=scratch), FORMS[form](modules(seed=7), scratch=scratch)
    x, dy, plus = inputs()
    both_ways(other, *inputs(1))
    y, dx = both_ways(linear, x, dy, plus)
    restored = linear.weight().clone()  # type: ignore[operator]
    assert 1e-3 < float((restored - weight).norm() / weight.norm()) < furthest
    torch.testing.assert_close(y, x @ restored.t() + plus, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dy @ restored, rtol=1e-5, atol=1e-5)


def test_stored_e4m3_is_the_e4m3_that_is_multiplied_in() -> None:
    stored, multiplied = FORMS["fp8_stored"](modules(), scratch=Scratch()), Fp8Linear(modules())
    torch.testing.assert_close(stored.weight(), multiplied.weight.dequantize(), rtol=1e-6, atol=0.0)  # type: ignore[operator]


def test_moving_e4m3_is_multiplied_in_as_it_is() -> None:
    scratch = Scratch()
    moving, other = (Fp8MovingLinear(modules(seed), scratch) for seed in (0, 7))
    expected = both_ways(Fp8Linear(modules()), *inputs())
    both_ways(other, *inputs(1))  # takes the scratch in between
    for got, wanted in zip(both_ways(moving, *inputs()), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_scratch_stays_where_it_is() -> None:
    scratch = Scratch()
    scratch.reserve(64)
    scratch.reserve(16)
    first = scratch.take((4, 4), torch.float32, DEVICE)
    second = scratch.take((3, 4), torch.bfloat16, DEVICE)
    assert first.data_ptr() == second.data_ptr() and second.shape == (3, 4)
    with pytest.raises(AssertionError, match="before all have reserved"):
        scratch.reserve(128)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 300), (128, 64), (5, 257)])
def test_transposes(rows: int, columns: int) -> None:
    wide = draw(rows, columns + 16).to(torch.float8_e4m3fn)
    out = torch.full((columns, rows + 8), 0x7F, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    transpose(wide[:, :columns], out[:, :rows])
    assert torch.equal(out[:, :rows].float(), wide[:, :columns].float().t())
    assert (out[:, rows:].view(torch.uint8) == 0x7F).all(), "what lies beside is left alone"
