"""Which noise levels a step trains on.

Levels are stratified over the global batch: of B samples exactly one falls in each of B equal parts of
the distribution, so a step's loss depends less on luck. Distributions are given by their quantile
function, applied to stratified uniform numbers.
"""

import torch
from torch import Tensor

from hdl.seeds import generator_for

SIGMA_MIN, SIGMA_MAX = 1e-4, 1.0 - 1e-4  # sigma lies in the open interval (0, 1)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """s(x) = shift x / (1 + (shift - 1) x): more weight on high noise for shift > 1."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def draw_sigmas(
    count: int, seed: int, step: int, *, distribution: str, mean: float, std: float, shift: float
) -> Tensor:
    """float32 [count] for the whole global batch of a step, the same on every rank.

    distribution: "uniform", or "logit_normal" with the `mean` and `std` of logit(sigma); `shift` is
    applied on top (1.0 leaves it alone).
    """
    generator = generator_for(seed, "sigma", step)
    strata = torch.randperm(count, generator=generator)
    u = (strata + torch.rand(count, generator=generator)) / count
    if distribution == "uniform":
        sigma = u
    elif distribution == "logit_normal":
        sigma = torch.sigmoid(mean + std * torch.special.ndtri(u))
    else:
        raise ValueError(f"unknown sigma distribution {distribution!r}")
    return shift_sigma(sigma, shift).clamp(SIGMA_MIN, SIGMA_MAX)
