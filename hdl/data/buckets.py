"""Which size an image is trained at, and how it gets there.

A bucket is a grid of 32-pixel patches: rows x cols. Nothing is ever stretched: an image is scaled by one
factor until it covers its bucket, and what overhangs is cropped evenly from two opposite sides. A bucket
has at most the target area and, unless upscaling is allowed, no more pixels than the image itself in
either direction, so a small image gets a small bucket of its own shape.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

# Pixels may first be averaged in whole blocks (fast), as long as Lanczos still shrinks by this much.
REDUCING_GAP = 3.0
Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels
PATCH = 32  # hdl.o1.patches.PATCH; worker processes import this file and must not have to load torch


@lru_cache(maxsize=65536)
def choose_bucket(width: int, height: int, area: int, allow_upscaling: bool) -> tuple[int, int]:
    """(rows, cols) for an image of width x height pixels, both at least 32.

    area: the side in pixels of the square whose area a bucket may have at most (1024 means 1024² px).
    Of all grids that fit, the best keeps the most: share of the picture left after the crop, times share
    of the linear resolution (the square root of the area) left after shrinking.
    """
    limit = area * area
    if not allow_upscaling:
        limit = min(limit, width * height)
    budget = limit // PATCH**2
    most_cols = budget if allow_upscaling else min(budget, width // PATCH)
    most_rows = budget if allow_upscaling else height // PATCH
    shape = width / height

    best, best_kept = (1, 1), 0.0
    for cols in range(1, most_cols + 1):
        for rows in {math.floor(cols / shape), math.ceil(cols / shape), budget // cols}:
            rows = min(max(rows, 1), most_rows)
            if rows * cols > budget:
                continue
            picture = min(cols / rows / shape, shape * rows / cols)
            kept = picture * math.sqrt(rows * cols / budget)
            if kept > best_kept:
                best, best_kept = (rows, cols), kept
    return best


@dataclass(frozen=True)
class Shrunk:
    """How an image was decoded small: at one `divisor`-th of its size, its pixels averages of divisor x divisor.

    left, top: the image's own corner, in its full pixels, in what was decoded; not 0 where the image was turned and
    its side is no multiple of the divisor, for then the incomplete averages are in front.
    """

    divisor: int = 1
    left: int = 0
    top: int = 0


FULL = Shrunk()


def fit(
    image: Image.Image, rows: int, cols: int, window: Window | None = None, shrunk: Shrunk = FULL
) -> Image.Image:
    """The RGB image, or a window of it, scaled to cover rows x cols patches and centre-cropped to them.

    window: in full pixels, also where the image was decoded small; it must be given then.
    """
    width, height = cols * PATCH, rows * PATCH
    left, top, right, bottom = window or (0, 0, image.width, image.height)
    scale = max(width / (right - left), height / (bottom - top))
    crop_width, crop_height = width / scale, height / scale
    # A whole number of pixels: an image that is cropped but not scaled then keeps its pixels exactly.
    # (Rounding may make the crop wider than the window by a trifle: never start outside it.)
    x = left + max(0, math.floor((right - left - crop_width) / 2))
    y = top + max(0, math.floor((bottom - top - crop_height) / 2))
    x, y = x + shrunk.left, y + shrunk.top
    box = (
        x / shrunk.divisor,
        y / shrunk.divisor,
        min((x + crop_width) / shrunk.divisor, image.width),
        min((y + crop_height) / shrunk.divisor, image.height),
    )
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)
