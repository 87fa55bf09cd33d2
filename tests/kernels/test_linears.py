"""Packed linears against PEFT's own forward and autograd, one pack at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hdl.kernels.adapter_copies import AdapterCopies
from hdl.kernels.linears import Buffer, Fp8Linear, FullLinear, PackedLinear
from hdl.kernels.quantize import Rowwise, empty_rows, quantize_rows, quantize_weight

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
K, WIDTHS = 48, (32, 16, 64)


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the kernels have tests of their own


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n, bias=False) for n in WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def adapted(targets: list[str], b_scale: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Three(), LoraConfig(r=5, lora_alpha=10, target_modules=targets)).to(DEVICE)  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, b_scale)
    return model


def filled(buffer: Buffer, values: Tensor, linear: PackedLinear) -> Buffer:
    buffer.wide.fill_(float("nan"))  # what is not written must not be read
    buffer.values.copy_(values)
    if buffer.wide_rows is not None:
        buffer.wide_rows.values.view(torch.uint8).fill_(0x7F)
        quantize_rows(
            values, column_scale=linear.gradient_scale if buffer.width == linear.n else None, into=buffer.rows
        )
    return buffer


def run(
    linear: PackedLinear, x: Tensor, dy: Tensor, plus: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    AdapterCopies([linear]).refresh()
    x_in = filled(linear.input_buffer(len(x)), x, linear)
    linear.lower_input(x_in)
    y = linear.forward(x_in, plus)
    d_out = filled(linear.gradient_buffer(len(x)), dy, linear)
    linear.lower_gradient(d_out)
    sizes = [p.numel() for p in linear.parameters()]
    flat = torch.full((sum(sizes) + 5,), float("nan"), device=DEVICE)
    linear.adapter_gradients(x_in, d_out, flat)
    assert flat[sum(sizes) :].isnan().all()
    parts = flat[: sum(sizes)].split(sizes)
    return y, linear.backward(d_out), [g.view(p.shape) for g, p in zip(parts, linear.parameters())]


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) < bound


@pytest.mark.parametrize("targets", [["q", "k", "v"], ["k"], ["q", "v"]], ids=",".join)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("plus", [False, True])
def test_full_equals_peft(targets: list[str], tokens: int, plus: bool) -> None:
    model = adapted(targets)
    x, dy = torch.randn(tokens, K, device=DEVICE), torch.randn(tokens, sum(WIDTHS), device=DEVICE)
    more = torch.randn(tokens, sum(WIDTHS), device=DEVICE) if plus else None
    leaf = x.clone().requires_grad_()
    expected = model(leaf)
    inner = model.base_model.model  # type: ignore[union-attr]
    linear = FullLinear([inner.q, inner.k, inner.v])  # type: ignore[list-item,union-attr]
    expected_dx, *expected_gradients = torch.autograd.grad(expected, [leaf, *linear.parameters()], dy)
    y, dx, gradients = run(linear, x, dy, more)
    assert close(y, expected if more is None else expected + more)
    assert close(dx, expected_dx)
    assert len(gradients) == 2 * len(targets)
    assert all(close(g, e) for g, e in zip(gradients, expected_gradients))
    assert close(model(x), expected)  # PEFT's own forward still works on the shared weights


def test_without_an_adapter() -> None:
    model = Three().to(DEVICE)
    x, dy = torch.randn(3, K, device=DEVICE), torch.randn(3, sum(WIDTHS), device=DEVICE)
    expected = model(x)
    linear = FullLinear([model.q, model.k, model.v])
    y, dx, gradients = run(linear, x, dy, None)
    weight = torch.cat([model.q.weight, model.k.weight, model.v.weight])
    assert close(y, expected) and close(dx, dy @ weight) and gradients == []


def rounded_weight(bases: list[nn.Linear]) -> Rowwise:
    """Each of the linears' weights in e4m3, under one another."""
    rows = empty_rows(sum(WIDTHS), K, DEVICE)
    for base, part in zip(bases, torch.arange(sum(WIDTHS)).split(WIDTHS)):
        here = slice(int(part[0]), int(part[-1]) + 1)
        quantize_weight(base.weight.detach(), Rowwise(rows.values[here], rows.scale[here]))
    return rows


def test_fp8_without_an_adapter_is_the_product_of_the_rounded_operands() -> None:
    model = Three().to(DEVICE)
    x, dy = torch.randn(7, K, device=DEVICE), torch.randn(7, sum(WIDTHS), device=DEVICE)
    rounded = rounded_weight([model.q, model.k, model.v])
    y, dx, gradients = run(Fp8Linear([model.q, model.k, model.v]), x, dy, None)
    assert close(y, quantize_rows(x).dequantize() @ rounded.dequantize().t())
    scaled = quantize_rows(dy, column_scale=rounded.scale).dequantize()
    assert close(dx, scaled @ rounded.values.float()) and gradients == []


def test_fp8_is_the_product_of_the_rounded_operands() -> None:
    model = adapted(["q", "v"], b_scale=0.1)  # as a LoRA does, it adds less than the frozen weights
    x, dy = torch.randn(7, K, device=DEVICE), torch.randn(7, sum(WIDTHS), device=DEVICE)
    inner = model.base_model.model  # type: ignore[union-attr]
    modules = [inner.q, inner.k, inner.v]  # type: ignore[union-attr]
    bases = [inner.q.base_layer, inner.k, inner.v.base_layer]  # type: ignore[union-attr]
    weight = torch.cat([b.weight.detach() for b in bases])  # type: ignore[union-attr]
    rounded = rounded_weight(bases)  # type: ignore[arg-type]
    lora = model(x) - x @ weight.t()
    leaf = x.clone().requires_grad_()
    full_dx = torch.autograd.grad(model(leaf), leaf, dy)[0]
    lora_dx = full_dx - dy @ weight

    linear = Fp8Linear(modules)  # type: ignore[arg-type]
    y, dx, gradients = run(linear, x, dy, None)
    frozen = quantize_rows(x).dequantize() @ rounded.dequantize().t()
    assert close(y - frozen, lora, 2**-8)  # as if the LoRA side were bfloat16
    scaled = quantize_rows(dy, column_scale=rounded.scale).dequantize()
    frozen_dx = scaled @ rounded.values.float()
    assert close(dx - frozen_dx, lora_dx, 2**-8)
    assert close(dx, full_dx, 0.05) and not close(dx, full_dx, 0.005)
    assert len(gradients) == 4
