"""How near drawn pictures come to those that were trained on, patch by patch.

Of every patch of a picture the nearest patch of the training pictures is looked for; the metric is the mean of these
distances (root mean square, of pixel values in [-1, 1]). By itself it says little: a clear sky is near every other.
The base's own pictures of the same prompts are the measure: an adapter whose pictures are much nearer than theirs
draws from memory.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hdl.data.mixture import Mixture
from hdl.data.samples import NO_CAPTION
from hdl.o1.patches import patchify, to_model

MOST_PATCHES = 2**16  # of the training pictures: 200 MB
CHUNK = 2**12


def training_patches(mixture: Mixture) -> Tensor:
    """uint8 [N, 3072]: of pictures that are trained on, evenly spread; all, if there are no more than MOST_PATCHES."""
    columns = mixture.columns
    trained = np.flatnonzero((mixture.quotas.expected > 0) & ~mixture.regularization)
    sizes = columns.patches(trained).astype(np.int64)
    stride = max(1, -(-int(sizes.sum()) // MOST_PATCHES))
    return torch.cat([mixture.read(int(i), NO_CAPTION).patches for i in trained[::stride]])


def nearest_distance(pictures: Sequence[Tensor], patches: Tensor, device: torch.device) -> float:
    """The mean distance of the pictures' patches, uint8 [H, W, 3] each, from the nearest of `patches` [N, 3072]."""
    drawn = to_model(torch.cat([patchify(p) for p in pictures]).to(device))
    nearest = torch.full((len(drawn),), torch.inf, device=device)
    for start in range(0, len(patches), CHUNK):
        known = to_model(patches[start : start + CHUNK].to(device))
        # In float32 the expanded square would lose the small distances that matter here.
        nearest = torch.minimum(
            nearest, torch.cdist(drawn, known, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
        )
    return float(nearest.mean()) / drawn.shape[1] ** 0.5
