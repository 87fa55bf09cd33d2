"""Which noise levels a step trains on.

Levels are stratified over the global batch: of B samples exactly one falls in each of B equal parts of
the distribution, so a step's loss depends less on luck. Distributions are given by their quantile
function, applied to stratified uniform numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdl.o1.patches import PATCH
from hdl.seeds import generator_for

SIGMA_MIN, SIGMA_MAX = 1e-4, 1.0 - 1e-4  # sigma lies in the open interval (0, 1)


def shift_sigma(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """s(x) = shift x / (1 + (shift - 1) x): more weight on high noise for shift > 1."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shift_by_size(shift: float, area: int | None, patches: Sequence[int]) -> float | Tensor:
    """The shift of each sample of a batch, float32 [len(patches)]: shift sqrt(its patches / those of a square picture
    with sides of `area` pixels); for area None `shift` itself, of all.

    Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23: with m pixels instead of n, a level leaves the
    same uncertainty once it is shifted by sqrt(m / n). Shifts multiply: shifting by a, then by b, is shifting by ab.
    """
    if area is None:
        return shift
    return shift * (torch.tensor(patches, dtype=torch.float32) / (area // PATCH) ** 2).sqrt()


def draw_sigmas(
    count: int, seed: int, step: int, *, distribution: str, mean: float, std: float, shift: float | Tensor
) -> Tensor:
    """float32 [count] for the whole global batch of a step, the same on every rank.

    distribution: "uniform", or "logit_normal" with the `mean` and `std` of logit(sigma); `shift` is
    applied on top (1.0 leaves it alone), one for all or [count], as from `shift_by_size`.
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
