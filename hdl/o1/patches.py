"""Images and patches: O1's latent is the image itself, cut into 32x32 squares.

A patch is 3072 numbers, ordered channel, row, column inside the square; patches run row by row over
the image: `C (H 32) (W 32) -> (H W) (C 32 32)`. Stored, a number is the image's own uint8; the model
sees `x / 127.5 - 1`.
"""

import torch
from torch import Tensor

PATCH = 32
PATCH_DIM = 3 * PATCH * PATCH


def patchify(image: Tensor) -> Tensor:
    """[H, W, 3] of any dtype, H and W multiples of 32 -> [(H/32)*(W/32), 3072] of the same dtype."""
    height, width, channels = image.shape
    if channels != 3 or height % PATCH or width % PATCH or not height or not width:
        raise ValueError(
            f"an image must be [H, W, 3] with sides in multiples of {PATCH}, got {tuple(image.shape)}"
        )
    squares = image.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return squares.permute(0, 2, 4, 1, 3).reshape(-1, PATCH_DIM)


def unpatchify(patches: Tensor, rows: int, cols: int) -> Tensor:
    """[rows*cols, 3072] -> [rows*32, cols*32, 3], the inverse of `patchify`."""
    squares = patches.reshape(rows, cols, 3, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2).reshape(rows * PATCH, cols * PATCH, 3)


def to_model(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0..255 -> [-1, 1] in `dtype`, computed in float32."""
    return (pixels.float() / 127.5 - 1.0).to(dtype)


def to_pixels(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clamped and rounded half to even, as the model's own code writes its images."""
    return ((x.float().clamp(-1, 1) + 1.0) * 0.5 * 255.0).round().to(torch.uint8)
