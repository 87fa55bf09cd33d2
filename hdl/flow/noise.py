"""Noise and noising, as the model was trained: z = (1 - sigma) x0 + sigma s eps.

The two published variants differ in the noise scale s, and dev's noise is clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdl.o1.patches import PATCH_DIM
from hdl.seeds import generator_for


@dataclass(frozen=True)
class Variant:
    """noise_scale: s; clip: eps is clipped at this many of its own standard deviations (None: never)."""

    noise_scale: float
    clip: float | None


VARIANTS = {"full": Variant(8.0, None), "dev": Variant(7.5, 2.5)}


def clip_noise(eps: Tensor, clip: float | None) -> Tensor:
    """Clip at `clip` times eps's own standard deviation."""
    if clip is None:
        return eps
    bound = clip * float(eps.std())
    return eps.clamp(-bound, bound)


def draw_noise(
    patch_counts: Sequence[int], places: Sequence[int], seed: int, step: int, device: torch.device | str
) -> Tensor:
    """float32 [sum(patch_counts), 3072], standard normal; each sample's noise depends on the run's seed,
    the step and its place in the global batch only, not on which rank or pack it is in."""
    eps = torch.empty(sum(patch_counts), PATCH_DIM, device=device)
    start = 0
    for count, place in zip(patch_counts, places):
        eps[start : start + count].normal_(generator=generator_for(seed, "noise", step, place, device=device))
        start += count
    return eps


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor, noise_scale: float) -> Tensor:
    """x0, eps [P, 3072], sigma [P] -> z [P, 3072]."""
    sigma = sigma[:, None]
    return (1.0 - sigma) * x0 + sigma * noise_scale * eps
