"""The flow-matching loss: how far the predicted clean patches are from the clean patches.

The model predicts x0, so the plain loss is the mean squared error of x_pred over patch tokens. A
velocity is (x_pred - z) / sigma, which makes the velocity loss the same error weighted by 1/sigma^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdl.kernels.head_loss import head_errors
from hdl.o1.decoder import Head
from hdl.o1.patches import to_model

MIN_SIGMA = 1e-3  # the model's own floor where it divides by sigma


def patch_errors(x_pred: Tensor, x0: Tensor) -> Tensor:
    """float32 [P]: mean squared error of each patch, of x_pred and x0 [P, 3072]."""
    return (x_pred.float() - x0.float()).square().mean(dim=-1)


def spread(values: Tensor, counts: Sequence[int]) -> Tensor:
    """A value a sample -> one a patch; counts: of the samples' patches."""
    return torch.cat([value.expand(count) for value, count in zip(values, counts)])


@dataclass(frozen=True)
class X0Error:
    """`patch_errors` of what a head reads off hidden states, without keeping the prediction.

    pixels: uint8 [P, 3072], the clean patches. Given to O1.forward as its `measure`.
    """

    pixels: Tensor

    def __call__(self, hidden: Tensor, head: Head) -> Tensor:
        """float32 [P], of hidden [P, D]. ValueError when the head requires a gradient.

        Under ZeRO-3, which marks its parameters with a `ds_id`, a weight is sure to be there only inside
        its module's own call (before, it may be empty, or still arriving): the prediction is made then, and
        kept.
        """
        if hasattr(head.linear.weight, "ds_id"):
            return patch_errors(head(hidden), to_model(self.pixels))
        return head_errors(hidden, head.linear.weight, head.linear.bias, self.pixels)


@dataclass(frozen=True)
class KeptError:
    """X0Error, but for kept rows the distance from what the base predicted there.

    rows: int64 [K], ascending; toward [K, 3072]: the base's prediction. Given to O1.forward as its `measure`.
    """

    pixels: Tensor
    rows: Tensor
    toward: Tensor

    def __call__(self, hidden: Tensor, head: Head) -> Tensor:
        """float32 [P], of hidden [P, D]."""
        if len(self.rows) == len(hidden):
            return patch_errors(head(hidden), self.toward)
        errors = X0Error(self.pixels)(hidden, head)
        return errors.index_copy(0, self.rows, patch_errors(head(hidden[self.rows]), self.toward))


def loss_weights(sigma: Tensor, weighting: str, noise_scale: float, gamma: float) -> Tensor:
    """What each patch's error is multiplied with: 1 for "x0", 1/max(sigma, 1e-3)^2 for "velocity", and for "min_snr"
    min(SNR, gamma) / gamma, with SNR = ((1 - sigma) / (sigma noise_scale))^2.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", have min(SNR, gamma) where x0 is
    predicted. Over gamma, it is at most 1, the weight of "x0": what train.grad_clip and a learning rate were
    chosen for stays in range whatever gamma is. With noise scale 8, gamma 5 is reached at sigma 0.053.
    """
    if weighting == "x0":
        return torch.ones_like(sigma)
    if weighting == "velocity":
        return sigma.clamp(min=MIN_SIGMA).pow(-2)
    if weighting == "min_snr":
        snr = ((1.0 - sigma) / (sigma.clamp(min=MIN_SIGMA) * noise_scale)).square()
        return snr.clamp(max=gamma) / gamma
    raise ValueError(f"unknown loss weighting {weighting!r}")


def velocity(x_pred: Tensor, z: Tensor, sigma: float) -> Tensor:
    """(x_pred - z) / max(sigma, 1e-3)."""
    return (x_pred - z) / max(sigma, MIN_SIGMA)
