"""One packed micro-batch: draw its noise, ask the model, measure its error.

This is where the flow-matching loop is the same for everyone: one rank or many, any sharding, any pack.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.flow.loss import X0Error, loss_weights, patch_errors
from hdl.flow.noise import Variant, noise_keys
from hdl.kernels.noising import noise_patches
from hdl.o1.decoder import References
from hdl.o1.patches import to_model
from hdl.o1.visual import VisualTower
from hdl.transfer import send


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
) -> tuple[Tensor, Tensor]:
    """The micro-batch's part of the step's loss, and each sample's own error.

    sigmas: float32 [global batch], this step's noise levels, in host memory. The step's loss is the mean
    over all patches of the global batch of the weighted patch error (weighted by noise level, and by sample as
    the batch says); what is returned sums to it over micro-batches and ranks. The second value, float32 [B] and
    detached, is each sample's mean unweighted x0 error.

    dtype: what the noisy patches are written in, the model's own. fused: the model takes its errors where
    its head is (hdl/kernels/head_loss.py), and returns these instead of x_pred. tower: the base's, needed where
    the batch has pairs. Their references are given to the model clean, and have no part in the loss.
    """
    device = batch.patches.device
    counts = batch.patch_counts
    levels = sigmas[batch.places]
    # All that the forward pass waits for goes in one copy.
    factors = loss_weights(levels, flow.weighting) * torch.tensor(batch.weights)
    sigma, t, weights = send(torch.stack([levels, 1.0 - levels, factors]), device)
    z = noise_patches(
        batch.patches, sigma, counts, noise_keys(batch.places, seed, step),
        noise_scale=variant.noise_scale, clip=variant.clip, dtype=dtype,
    )  # fmt: skip
    text, shown = with_references(batch, tower)
    inputs = (text, z, t, batch.layout)
    if fused:
        errors = model(*inputs, measure=X0Error(batch.patches), **shown)
    else:
        errors = patch_errors(model(*inputs, **shown), to_model(batch.patches))
    weight = torch.cat([w.expand(n) for w, n in zip(weights, counts)])
    loss = (errors * weight).sum() / batch.global_patches
    return loss, _mean_of_each(errors.detach(), counts)


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
