"""How large a picture is, as a person says it: 2560x1440, or 16:9 for the nearest of the model's own sizes."""

import math
import re

from hdl.errors import HdlError
from hdl.o1.patches import PATCH

# width, height; of the model's own code, all about 2048 x 2048 in area
_LANDSCAPE = [(2560, 1440), (2496, 1664), (3104, 1312), (2304, 1792), (2304, 1728)]
NATIVE = [(2048, 2048), *_LANDSCAPE, *((height, width) for width, height in _LANDSCAPE)]


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels. HdlError for what is neither WIDTHxHEIGHT in multiples of 32 nor a ratio W:H."""
    match = re.fullmatch(r"(\d+)([x:])(\d+)", text.strip().lower())
    if not match:
        raise HdlError(
            f"size {text!r}: expected WIDTHxHEIGHT in pixels, such as 2560x1440, or a ratio such as 16:9"
        )
    first, mark, second = int(match[1]), match[2], int(match[3])
    if not first or not second:
        raise HdlError(f"size {text!r}: expected sides above 0")
    if mark == ":":
        return min(NATIVE, key=lambda size: abs(math.log(size[0] / size[1] * second / first)))
    if first % PATCH or second % PATCH:
        nearest = "x".join(str(max(PATCH, round(side / PATCH) * PATCH)) for side in (first, second))
        raise HdlError(f"size {text!r}: expected multiples of {PATCH}; {nearest} is near")
    return first, second
