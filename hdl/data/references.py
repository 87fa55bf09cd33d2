"""Reference images of paired data, brought to the size at which the model sees them.

An image `a.png` with the source images `a.ref.png`, or `a.ref1.png`, `a.ref2.png`, ..., is the target of an
edit; its caption is the instruction. The resizing is the one the model was made with, not that of targets
(hdl/data/buckets.py): its sizes are the reference's own, and its filters are box and bicubic. Everything is
resampled from full decodes: patches are equal to the model's own to the bit (tests/golden/edit*).
"""

import math

from PIL import Image

from hdl.data.buckets import PATCH
from hdl.data.images import Skip


def largest_side(count: int, width: int, height: int) -> int:
    """M: the square of this side in px is the largest area of each of `count` references of a target of
    width x height px."""
    side = max(width, height)
    if count == 1:
        return side
    if count == 2:
        return side * 3 // 4
    if count <= 4:
        return side // 2
    if count <= 8:
        return side * 3 // 8
    return side // 4


def resize_reference(image: Image.Image, side: int) -> Image.Image:
    """The RGB image at the largest size in whole patches whose area is at most side². Skip where a patch is
    larger than that."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = reference_size(image.width, image.height, side)
    if image.width / width < image.height / height:
        scaled = width, round(image.height / (image.width / width))
    else:
        scaled = round(image.width / (image.height / height)), height
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    resized = image.resize(scaled, Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + width, top + height))


def reference_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) in px, multiples of 32, for a reference of width x height px; Skip where there is none."""
    scale = math.sqrt(side * side / (width * height))
    candidates = {
        (x(width * scale) // PATCH * PATCH, y(height * scale) // PATCH * PATCH)
        for x in (round, math.floor)
        for y in (round, math.floor)
    }
    fitting = [(w, h) for w, h in candidates if 0 < w * h <= side * side]
    if not fitting:
        raise Skip(
            "bad reference",
            f"a reference of {width}x{height} px would have to fit into the area of {side}x{side} px, where one "
            f"of its sides is shorter than a patch of {PATCH} px; use a larger target, or a squarer reference",
        )
    return max(fitting, key=lambda size: (size[0] * size[1], size))
