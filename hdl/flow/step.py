"""One packed micro-batch: draw its noise, ask the model, measure its error.

This is where the flow-matching loop is the same for everyone: one rank or many, any sharding, any pack.

Of kept samples (hdl/data/untriggered.py) the error is the distance from what the base predicts for the same noisy
patches and the same text, which `base_prediction` finds before: prior preservation. It needs no pictures beside those
that are trained on. They are noised like all others; where there is much noise, what is predicted is up to the text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.flow.loss import KeptError, X0Error, loss_weights, patch_errors, spread
from hdl.flow.noise import Variant, noise_keys
from hdl.flow.perceptual import Perceptual
from hdl.kernels.noising import noise_patches
from hdl.o1.decoder import Head, References
from hdl.o1.patches import to_model
from hdl.o1.visual import VisualTower
from hdl.transfer import send

Measure = Callable[[Tensor, Head], Tensor]  # of hidden states and the head, each patch's error


def flow_matching_loss(
    model: Callable[..., Tensor],
    batch: Batch,
    sigmas: Tensor,
    step: int,
    *,
    variant: Variant,
    flow: Flow,
    seed: int,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
    tower: VisualTower | None = None,
    toward: Tensor | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's part of the step's loss, and each sample's own error.

    sigmas: float32 [global batch], this step's noise levels, in host memory. The step's loss is the mean
    over all patches of the global batch of the weighted patch error (weighted by noise level, and by sample as
    the batch says); what is returned sums to it over micro-batches and ranks. The second value, float32 [B] and
    detached, is each sample's mean unweighted error.

    dtype: what the noisy patches are written in, the model's own. fused: the model takes its errors where
    its head is (hdl/kernels/head_loss.py), and returns these instead of x_pred. tower: the base's, needed where
    the batch has pairs. Their references are given to the model clean, and have no part in the loss. toward: of the
    batch's kept samples, their `base_prediction`. perceptual: adds its distances to the loss, but for kept samples; the
    x0 errors stay what they are.
    """
    counts = batch.patch_counts
    inputs, shown, weights = _inputs(
        batch, sigmas, step, variant=variant, flow=flow, seed=seed, dtype=dtype, tower=tower
    )
    rows = _kept_rows(batch)
    distances = None
    if fused and perceptual is None:
        measure: Measure = X0Error(batch.patches)
        if rows is not None:
            measure = KeptError(batch.patches, rows, _found(toward))
        errors = model(*inputs, measure=measure, **shown)
    else:
        target = to_model(batch.patches)
        if rows is not None:
            target = target.index_copy(0, rows, _found(toward).to(target.dtype))
        if perceptual is None:
            errors = patch_errors(model(*inputs, **shown), target)
        else:
            errors, distances = model(*inputs, measure=perceptual.measure(batch, target), **shown)
    loss = (errors * spread(weights, counts)).sum()
    if perceptual is not None and distances is not None:
        pictured = torch.tensor([0.0 if kept else 1.0 for kept in batch.kept] or [1.0] * len(counts))
        factors = perceptual.factors(sigmas[batch.places]) * torch.tensor(batch.weights) * pictured
        loss = loss + (distances * spread(send(factors, distances.device), counts)).sum()
    loss = loss / batch.global_patches
    return loss, _mean_of_each(errors.detach(), counts)


@torch.no_grad()
def base_prediction(
    model: Callable[..., Tensor],
    batch: Batch,
    sigmas: Tensor,
    step: int,
    *,
    variant: Variant,
    flow: Flow,
    seed: int,
    dtype: torch.dtype = torch.float32,
    tower: VisualTower | None = None,
) -> Tensor:
    """x_pred [P, 3072] of the batch's noisy patches: what `flow_matching_loss` is to be given as `toward`.

    model: with its adapter off; batch: another's `base`; the rest as flow_matching_loss takes it.
    """
    inputs, shown, _ = _inputs(
        batch, sigmas, step, variant=variant, flow=flow, seed=seed, dtype=dtype, tower=tower
    )
    return model(*inputs, **shown)


def _inputs(
    batch: Batch, sigmas: Tensor, step: int, *,
    variant: Variant, flow: Flow, seed: int, dtype: torch.dtype, tower: VisualTower | None,
) -> tuple[tuple[Any, ...], dict[str, References], Tensor]:  # fmt: skip
    """What the model is given, by place and by name, and each sample's factor in the loss."""
    levels = sigmas[batch.places]
    # All that the forward pass waits for goes in one copy.
    factors = loss_weights(levels, flow.weighting, variant.noise_scale, flow.min_snr_gamma)
    factors = factors * torch.tensor(batch.weights)
    sigma, t, weights = send(torch.stack([levels, 1.0 - levels, factors]), batch.patches.device)
    z = noise_patches(
        batch.patches, sigma, batch.patch_counts, noise_keys(batch.places, seed, step),
        noise_scale=variant.noise_scale, clip=variant.clip, dtype=dtype,
    )  # fmt: skip
    text, shown = with_references(batch, tower)
    return (text, z, t, batch.layout), shown, weights


def _found(toward: Tensor | None) -> Tensor:
    assert toward is not None, "kept samples are held against the base's prediction"
    return toward


def _kept_rows(batch: Batch) -> Tensor | None:
    """int64 [K]: the patches of the kept samples; None where none is."""
    if not any(batch.kept):
        return None
    rows = torch.arange(len(batch.patches)).split(batch.patch_counts)
    return send(torch.cat([part for part, kept in zip(rows, batch.kept) if kept]), batch.patches.device)


def with_references(batch: Batch, tower: VisualTower | None) -> tuple[Tensor, dict[str, References]]:
    """The text embeddings [T, D] with what the tower sees of the batch's references in their places, and what else
    of them a model is to be given, by argument; of a batch without any, the text as it is and nothing."""
    if batch.references is None or batch.look is None:
        return batch.text, {}
    assert tower, "pairs need the base's visual tower"
    view, layout = tower.view(batch.look), batch.layout
    rows = layout.order[layout.seen_index]  # of the text
    text = batch.text.to(view.features.dtype).index_copy(0, rows, view.features)
    return text, {"references": References(to_model(batch.references), view.deepstack)}


def _mean_of_each(values: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.stack([part.mean() for part in values.split(list(counts))])
