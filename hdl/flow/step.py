"""One packed micro-batch: draw its noise, ask the model, measure its error.

This is where the flow-matching loop is the same for everyone: one rank or many, any sharding, any pack.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.flow.loss import loss_weights, patch_errors
from hdl.flow.noise import Variant, add_noise, clip_noise, draw_noise
from hdl.o1.patches import to_model


def flow_matching_loss(
    model: Callable[..., Tensor],
    batch: Batch,
    sigmas: Tensor,
    step: int,
    *,
    variant: Variant,
    flow: Flow,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's part of the step's loss, and each sample's own error.

    sigmas: float32 [global batch], this step's noise levels. The step's loss is the mean over all patches
    of the global batch of the weighted patch error; what is returned sums to it over micro-batches and
    ranks. The second value, float32 [B] and detached, is each sample's mean unweighted x0 error.
    """
    device = batch.patches.device
    counts = batch.patch_counts
    sigma_of_sample = sigmas[batch.places].to(device)
    sigma = sigma_of_sample.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))
    x0 = to_model(batch.patches)
    eps = draw_noise(counts, batch.places, seed, step, device)
    eps = torch.cat([clip_noise(e, variant.clip) for e in eps.split(counts)])
    z = add_noise(x0, eps, sigma, variant.noise_scale)
    errors = patch_errors(model(batch.text, z, 1.0 - sigma_of_sample, batch.layout), x0)
    loss = (errors * loss_weights(sigma, flow.weighting)).sum() / batch.global_patches
    return loss, _mean_of_each(errors.detach(), counts)


def _mean_of_each(values: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.stack([part.mean() for part in values.split(list(counts))])
