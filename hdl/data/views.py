"""What is taken of one image: the whole of it at one or several sizes, and windows of it.

Everything here is a function of the image's upright size, its hash and the options, so that a rerun knows
from a file's header which samples the image gives. Imported by worker processes: nothing heavy here.
"""

import random
from dataclasses import dataclass

from hdl.data.buckets import PATCH, Window, choose_bucket

SMALLEST, LARGEST = 0.5, 0.9  # a window's sides, of the image's
MOST_SKEWED = 1.25  # a window's aspect ratio differs from the image's by at most this factor


@dataclass(frozen=True)
class Sizes:
    """areas: sides in px of the squares whose areas the whole image's buckets may have at most, ascending.
    crops: how many windows are taken besides. allow_upscaling: enlarge small images."""

    areas: tuple[int, ...]
    crops: int = 0
    allow_upscaling: bool = False

    def names(self) -> list[str | None]:
        """Of all views an image can give, in the order of its samples; None where there is only one."""
        if len(self.areas) == 1 and not self.crops:
            return [None]
        return [*map(str, self.areas), *(f"crop{i}" for i in range(1, self.crops + 1))]


@dataclass(frozen=True)
class View:
    """A window of the upright image, in its pixels, and the patches it is scaled to cover."""

    name: str | None
    window: Window
    rows: int
    cols: int

    @property
    def scale(self) -> float:
        """Pixels of the view a pixel of the image."""
        left, top, right, bottom = self.window
        return max(self.cols * PATCH / (right - left), self.rows * PATCH / (bottom - top))


def views_of(width: int, height: int, digest: str, sizes: Sizes) -> list[View]:
    """The views of an image of width x height px, both at least 32, whose file has this sha256.

    An image too small for two areas' buckets to differ gives the smaller area's alone, and one too small
    for a window of its own gives none. Windows get the bucket of the largest area.
    """
    whole = (0, 0, width, height)
    single = sizes.names() == [None]
    views: list[View] = []
    for area in sizes.areas:
        rows, cols = choose_bucket(width, height, area, sizes.allow_upscaling)
        if all((view.rows, view.cols) != (rows, cols) for view in views):
            views.append(View(None if single else str(area), whole, rows, cols))
    for i in range(1, sizes.crops + 1):
        left, top, right, bottom = window = random_window(width, height, f"{digest} {i}")
        if window != whole:
            rows, cols = choose_bucket(right - left, bottom - top, sizes.areas[-1], sizes.allow_upscaling)
            views.append(View(f"crop{i}", window, rows, cols))
    return views


def random_window(width: int, height: int, seed: str) -> Window:
    """A window with 50 to 90 % of each side, nearly as wide for its height as the image; at least a patch."""
    draw = random.Random(seed)
    share = draw.uniform(SMALLEST, LARGEST)
    skewed = share * draw.uniform(1 / MOST_SKEWED, MOST_SKEWED)
    shares = [share, min(max(skewed, SMALLEST), LARGEST)]
    draw.shuffle(shares)
    wide, high = (max(PATCH, round(side * part)) for side, part in zip((width, height), shares))
    left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
    return left, top, left + wide, top + high
