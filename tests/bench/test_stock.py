"""The stock arm does the same work as hdl's reference path: same prediction, same loss, same gradients."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from hdl.adapter.lora import attach
from hdl.bench.cases import Case, all_cases, packs
from hdl.bench.stock import StockDecoder, stock_loss, stock_model
from hdl.config import Flow, Lora
from hdl.data.batches import Batch
from hdl.flow.noise import VARIANTS
from hdl.flow.step import flow_matching_loss
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.seeds import generator_for

LORA = Lora(rank=4, alpha=4)
CPU = torch.device("cpu")
Pair = tuple[PeftModel, PeftModel]


@pytest.fixture
def pair(tiny_base: Path) -> Pair:
    """Stock and plain from the same random weights, with the same adapter."""
    checkpoint = open_checkpoint(tiny_base, random_init=True)
    stock = stock_model(checkpoint, tiny_base / "config.json", LORA, 0, CPU, torch.float32)
    plain = attach(load_model(checkpoint, CPU, torch.float32), LORA, "", 0)
    return stock.train(), plain.train()


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fill_adapters(pair: Pair, b_is_zero: bool) -> None:
    stock, plain = (trainable(model) for model in pair)
    assert stock.keys() == plain.keys() and len(stock) == 4 * 7 * 2
    with torch.no_grad():
        for name, parameter in stock.items():
            values = torch.randn(parameter.shape, generator=generator_for(name)) * 0.05
            parameter.copy_(values * 0 if b_is_zero and "lora_B" in name else values)
            plain[name].copy_(parameter)


def batch_of(case: str) -> Batch:
    [batch] = packs(all_cases(tiny=True)[case].samples(0, dim=64), together=True, pin=False)
    return batch


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("b_is_zero", [True, False])
@pytest.mark.parametrize("case", ["1024x4", "2048x1"])
def test_prediction_loss_and_gradients_are_those_of_the_plain_path(
    pair: Pair, case: str, b_is_zero: bool
) -> None:
    fill_adapters(pair, b_is_zero)
    batch = batch_of(case)
    sigma = torch.rand(len(batch.places), generator=generator_for("sigma"))
    eps = torch.randn(batch.patches.shape, generator=generator_for("eps"))
    predictions: list[Tensor] = []
    losses = []
    for model in pair:

        def remember(*inputs: object, model: PeftModel = model) -> Tensor:
            predictions.append(model(*inputs))
            return predictions[-1]

        loss = stock_loss(remember, batch, sigma, eps)
        loss.backward()
        losses.append(float(loss.detach()))
    assert relative(*predictions) < 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    stock, plain = (trainable(model) for model in pair)
    for name, parameter in plain.items():
        assert parameter.grad is not None and stock[name].grad is not None
        if b_is_zero and "lora_A" in name:
            assert not parameter.grad.any() and not stock[name].grad.any()
        else:
            assert parameter.grad.norm() > 0, name
            assert relative(stock[name].grad, parameter.grad) < 1e-4, name


def test_the_stock_loss_is_the_training_loss(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the noise that hdl's own step draws, found out from what it shows the model."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # its formula is quicker on a CPU
    batch = batch_of("1024x4")
    sigmas = torch.tensor([0.9, 0.2, 0.5, 0.7])
    _, plain = pair
    shown: list[Tensor] = []

    def model(text: Tensor, z: Tensor, t: Tensor, layout: object) -> Tensor:
        shown.append(z)
        return plain(text, z, t, layout)

    loss, _ = flow_matching_loss(model, batch, sigmas, 3, variant=VARIANTS["full"], flow=Flow(), seed=1)
    sigma = sigmas.repeat_interleave(len(batch.patches) // 4)[:, None]
    x0 = batch.patches.float() / 127.5 - 1
    eps = (shown[0].float() - (1 - sigma) * x0) / (sigma * 8.0)
    assert 0.95 < float(eps.std()) < 1.05
    assert float(stock_loss(plain, batch, sigmas, eps).detach()) == pytest.approx(
        float(loss.detach()), rel=1e-5
    )


def test_one_by_one_adds_up_to_the_pack(pair: Pair) -> None:
    """Mixed sizes: the parts' losses and gradients sum to those of our single pack."""
    fill_adapters(pair, b_is_zero=False)
    stock, plain = pair
    case: Case = all_cases(tiny=True)["mixed"]
    samples = case.samples(0, dim=64)
    sigmas = torch.tensor([0.9, 0.2, 0.5, 0.7])
    eps = [torch.randn(s.patches.shape, generator=generator_for("eps", s.key)) for s in samples]
    total = 0.0
    for batch in packs(samples, together=False, pin=False):
        [place] = batch.places
        loss = stock_loss(stock, batch, sigmas[batch.places], eps[place])
        loss.backward()
        total += float(loss.detach())

    [pack] = packs(samples, together=True, pin=False)
    x0 = pack.patches.float() / 127.5 - 1
    sigma = sigmas.repeat_interleave(torch.tensor(pack.patch_counts))[:, None]
    x_pred = plain(pack.text, (1 - sigma) * x0 + sigma * 8.0 * torch.cat(eps), 1 - sigmas, pack.layout)
    together = (x_pred - x0).square().mean()
    together.backward()
    assert total == pytest.approx(float(together.detach()), rel=1e-6)
    for name, parameter in trainable(plain).items():
        assert relative(trainable(stock)[name].grad, parameter.grad) < 1e-4, name  # type: ignore[arg-type]


def test_several_shapes_in_one_batch_are_refused(pair: Pair) -> None:
    batch = batch_of("mixed")
    with pytest.raises(ValueError, match="expected one shape"):
        stock_loss(pair[0], batch, torch.full((4,), 0.5), torch.zeros(batch.patches.shape))


def test_every_layer_is_recomputed_in_backward(pair: Pair) -> None:
    stock, _ = pair
    [decoder] = [m for m in stock.modules() if isinstance(m, StockDecoder)]
    calls: list[int] = []
    for i, layer in enumerate(decoder.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: calls.append(i))
    batch = batch_of("1024x1")
    loss = stock_loss(stock, batch, torch.tensor([0.5]), torch.randn(batch.patches.shape))
    assert calls == [0, 1, 2, 3]
    loss.backward()
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]


def test_everything_is_in_the_asked_dtype(tiny_base: Path) -> None:
    checkpoint = open_checkpoint(tiny_base, random_init=True)
    stock = stock_model(checkpoint, tiny_base / "config.json", LORA, 0, CPU, torch.bfloat16)
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in [*stock.parameters(), *stock.buffers()]} == {"cpu"}
    assert {name.rsplit(".", 3)[1] for name in trainable(stock)} == {"lora_A", "lora_B"}
