"""Noise and noising, as the model was trained: z = (1 - sigma) x0 + sigma s eps.

The two published variants differ in the noise scale s, and dev's noise is clipped. A training step does
all of this in one pass from the stored pixels, in hdl.kernels.noising.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hdl.seeds import derive_seed


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


def noise_keys(places: Sequence[int], seed: int, step: int) -> list[int]:
    """What each sample's noise is drawn from: it depends on the run's seed, the step and the sample's place
    in the global batch only, not on which rank or pack it is in."""
    return [derive_seed(seed, "noise", step, place) for place in places]


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor, noise_scale: float) -> Tensor:
    """x0, eps [P, 3072], sigma [P] -> z [P, 3072]."""
    sigma = sigma[:, None]
    return (1.0 - sigma) * x0 + sigma * noise_scale * eps
