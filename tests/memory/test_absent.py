"""Weights left in the checkpoint: what stands in for them, and that they end where they belong."""

import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from hdl.adapter.lora import adapter_parameters, attach
from hdl.config import Lora
from hdl.kernels.fuse import fuse
from hdl.memory.absent import bring_in, stand_in, weight_of
from hdl.o1.checkpoint import Checkpoint, load_model, open_checkpoint
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import PATCH_DIM


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def adapted(base: Path, absent: bool) -> PeftModel:
    model = attach(load_model(open_checkpoint(base), "cpu", torch.float32, absent), Lora(rank=4), "base", 0)
    generator = torch.Generator().manual_seed(0)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.05, generator=generator)
    return model


def x_pred(model: PeftModel) -> Tensor:
    hidden = model.get_base_model().config.hidden_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    layout = lay_out([Segment(5, 2, 3), Segment(3, 1, 2)])
    text, z = torch.randn(8, hidden, generator=generator), torch.randn(8, PATCH_DIM, generator=generator)
    with torch.no_grad():
        return model(text, z, torch.tensor([0.3, 0.8]), layout)


def linears(model: nn.Module) -> list[nn.Linear]:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    return [m for n, m in found if "lora_" not in n]


def test_a_stand_in_takes_no_memory_and_is_no_parameter(tiny_base: Path) -> None:
    model, whole = (
        load_model(open_checkpoint(tiny_base), "cpu", torch.bfloat16, absent) for absent in (True, False)
    )
    assert stand_in(torch.Size([4096, 4096]), "cpu", torch.bfloat16).untyped_storage().nbytes() == 2
    for linear, there in zip(linears(model), linears(whole), strict=True):
        assert linear.weight.shape == there.weight.shape and linear.weight.dtype == torch.bfloat16
        assert torch.equal(weight_of(linear), there.weight)
    absent = {n for n, _ in whole.named_parameters()} - {n for n, _ in model.named_parameters()}
    assert len(absent) == len(linears(whole)) and all(".layers." in name for name in absent)


def test_brought_in_they_are_as_if_they_had_been_loaded(tiny_base: Path) -> None:
    model, whole = adapted(tiny_base, absent=True), adapted(tiny_base, absent=False)
    bring_in(model)
    theirs = dict(whole.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(p, theirs[n]) and p.requires_grad == theirs[n].requires_grad for n, p in ours.items()
    )
    assert torch.equal(x_pred(model), x_pred(whole))


@pytest.mark.parametrize("form", ["full", "fp8", "fp8_once", "fp8_stored", "nf4"])
def test_packing_absent_weights_is_packing_loaded_ones(tiny_base: Path, form: str) -> None:
    model, whole = adapted(tiny_base, absent=True), adapted(tiny_base, absent=False)
    for m in (model, whole):
        fuse(m, weights=form)
    assert torch.equal(x_pred(model), x_pred(whole))
    assert not any(hasattr(linear, "read_weight") for linear in linears(model))


def test_one_weight_at_a_time_is_in_memory_in_its_old_form(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        assert not any(ref() is not None for ref in alive), "the weight before is still there"
        weight = read(self, name, device, dtype)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Checkpoint, "read", watched)
    for form in ("full", "fp8", "fp8_once", "fp8_stored", "nf4"):
        alive.clear()
        model = adapted(tiny_base, absent=True)
        fuse(model, weights=form)
        assert len(alive) == len(linears(model))
