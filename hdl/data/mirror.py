"""Mirroring a picture that is already cut into patches: exactly the patches of the mirrored picture."""

from torch import Tensor

from hdl.o1.patches import PATCH


def mirrored(patches: Tensor, rows: int, cols: int) -> Tensor:
    """[rows*cols, 3072] of any dtype, `C (H 32) (W 32) -> (H W) (C 32 32)`; left and right change places."""
    squares = patches.reshape(
        rows, cols, 3 * PATCH, PATCH
    )  # the squares' order in a row, and each row of pixels
    return squares.flip(1, 3).reshape(patches.shape)
