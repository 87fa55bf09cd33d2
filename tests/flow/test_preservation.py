"""Kept samples: their target is the base's own prediction, and nothing else of a step changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.flow.loss import patch_errors
from hdl.flow.noise import VARIANTS
from hdl.flow.step import base_prediction, flow_matching_loss
from hdl.o1.decoder import O1
from hdl.o1.patches import to_model
from tests.flow.test_flow import batch_of, tiny_model

SIGMAS = torch.tensor([0.3, 0.8, 0.6])
GRIDS = [(1, 2), (1, 1), (2, 2)]
PLACES = [0, 1, 2]
PATCHES = 7


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def kept_batch(kept: list[int]) -> Batch:
    def filled(places: list[int]) -> Batch:
        batch = batch_of([GRIDS[p] for p in places], places, PATCHES)
        text = torch.cat([torch.randn(4, 32, generator=torch.Generator().manual_seed(p)) for p in places])
        return replace(batch, text=text)

    return replace(
        filled(PLACES), kept=tuple(p in kept for p in PLACES), base=filled(kept), weights=[1.0, 0.5, 2.0]
    )


def models() -> tuple[O1, O1]:
    """A base, and one that was trained away from it."""
    base, trained = tiny_model(), tiny_model()
    with torch.no_grad():
        trained.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    return base, trained


def settings() -> dict:  # type: ignore[type-arg]
    return {"variant": VARIANTS["full"], "flow": Flow(), "seed": 1}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kept", [[1], [0, 2], [0, 1, 2]])
def test_a_kept_sample_is_held_against_the_base(kept: list[int], fused: bool) -> None:
    base, trained = models()
    weight = trained.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    batch = kept_batch(kept)
    assert batch.base
    toward = base_prediction(base, batch.base, SIGMAS, 3, **settings())
    loss, errors = flow_matching_loss(trained, batch, SIGMAS, 3, fused=fused, toward=toward, **settings())

    # Written out: both models see the same noisy patches and text, sample by sample.
    seen: list[Tensor] = []

    def listening(*inputs: Tensor) -> Tensor:
        seen[:] = inputs
        return inputs[1]

    flow_matching_loss(listening, batch, SIGMAS, 3, toward=toward, **settings())
    predicted = trained(*seen)
    target = torch.where(
        torch.tensor(batch.kept).repeat_interleave(torch.tensor(batch.patch_counts))[:, None],
        base(*seen).detach(), to_model(batch.patches),
    )  # fmt: skip
    expected = patch_errors(predicted, target)
    factors = torch.tensor(batch.weights).repeat_interleave(torch.tensor(batch.patch_counts))
    expected_loss = (expected * factors).sum() / PATCHES
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    by_sample = torch.stack([part.mean() for part in expected.split(batch.patch_counts)])
    assert torch.allclose(errors, by_sample, rtol=1e-4)
    found, wanted = (torch.autograd.grad(value, weight)[0] for value in (loss, expected_loss))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_an_untrained_adapter_has_nothing_to_give_back() -> None:
    base, _ = models()
    batch = kept_batch([0, 1, 2])
    assert batch.base
    toward = base_prediction(base, batch.base, SIGMAS, 3, **settings())
    loss, _ = flow_matching_loss(base, batch, SIGMAS, 3, toward=toward, **settings())
    assert loss < 1e-10


def test_the_base_predicts_without_a_graph() -> None:
    _, trained = models()
    trained.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    batch = kept_batch([1])
    assert batch.base and not base_prediction(trained, batch.base, SIGMAS, 3, **settings()).requires_grad


def test_a_batch_goes_to_a_device_with_what_its_base_is_to_predict() -> None:
    moved = kept_batch([1]).to("meta")
    assert moved.base and moved.base.patches.is_meta and moved.kept == (False, True, False)


def test_none_kept_is_the_loss_as_it_was() -> None:
    base, trained = models()
    batch = kept_batch([1])
    plain = replace(batch, kept=(), base=None)
    of_nobody = replace(batch, kept=(False, False, False))  # what a rank has whose neighbour keeps something
    toward = base_prediction(base, of_nobody.base, SIGMAS, 3, **settings())  # type: ignore[arg-type]
    first = flow_matching_loss(trained, plain, SIGMAS, 3, **settings())
    second = flow_matching_loss(trained, of_nobody, SIGMAS, 3, toward=toward, **settings())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
