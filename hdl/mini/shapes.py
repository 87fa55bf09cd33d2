"""The things and the places that the small pictures are made of, as soft masks.

What is unusual here: the drawings are made for a model whose head is one linear map. Every 32x32 patch the model can
draw lies in a space of at most `hidden` dimensions, so the shapes come in two sizes, sit centred on the corners of
the patch grid (each shape is then always cut into the same four pieces), have soft edges and no texture. What is
drawn once is kept: a scene is a few blends of cached arrays.

A thing is drawn in its own coordinates, x to the right and y down, both from -1 to 1; a place fills the whole canvas.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.floating]  # [H, W, 3] in 0..1
Mask = NDArray[np.floating]  # [H, W, 1] in 0..1
Colour = tuple[int, int, int]

CANVAS = 128  # pixels
WINDOW = 64  # pixels; the square around a thing
RADIUS = {"small": 16.0, "big": 28.0}  # pixels a unit of a thing's own coordinates
OUTLINE = {"small": 2.0, "big": 2.6}  # pixels
EDGE = 0.6  # pixels; standard deviation of the blur that softens every edge
OVERSAMPLING = 4

COLOURS: dict[str, Colour] = {
    "red": (214, 48, 44),
    "orange": (240, 138, 36),
    "yellow": (248, 212, 52),
    "green": (62, 158, 70),
    "teal": (34, 158, 158),
    "blue": (48, 96, 208),
    "purple": (134, 66, 176),
    "pink": (244, 132, 178),
    "brown": (136, 84, 48),
    "white": (248, 248, 244),
    "black": (38, 38, 44),
}
WOOD, LEAF, GLASS, STONE = (122, 82, 50), (70, 150, 66), (250, 226, 130), (84, 86, 94)

# A part's paint: "main" is the colour a caption names; "dark" and "light" are shades of it; the rest is fixed.
Paint = str | Colour


def shade(paint: Paint, main: Colour) -> Pixels:
    """The RGB (float32 [3] in 0..1) of a part whose thing has the colour `main`."""
    rgb = np.asarray(main if isinstance(paint, str) else paint, np.float32) / 255
    if paint == "dark":
        return rgb * np.float32(0.6)
    if paint == "light":
        return rgb * np.float32(0.5) + np.float32(0.5)
    return rgb


class Pen:
    """Draws into the mask of one part, in a thing's own coordinates."""

    def __init__(self, side: int, scale: float) -> None:
        self.image = Image.new("L", (side, side))
        self.draw = ImageDraw.Draw(self.image)
        self.middle, self.scale = side / 2, scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.middle + x * self.scale, self.middle + y * self.scale

    def ellipse(self, x: float, y: float, rx: float, ry: float | None = None, ink: int = 255) -> None:
        ry = rx if ry is None else ry
        self.draw.ellipse([self.at(x - rx, y - ry), self.at(x + rx, y + ry)], fill=ink)

    def box(self, left: float, top: float, right: float, bottom: float, ink: int = 255) -> None:
        self.draw.rectangle([self.at(left, top), self.at(right, bottom)], fill=ink)

    def polygon(self, *points: tuple[float, float], ink: int = 255) -> None:
        self.draw.polygon([self.at(*point) for point in points], fill=ink)

    def slice(self, x: float, y: float, r: float, start: float, end: float, ink: int = 255) -> None:
        """A piece of pie; angles in degrees, clockwise from the right."""
        self.draw.pieslice([self.at(x - r, y - r), self.at(x + r, y + r)], start, end, fill=ink)


Part = tuple[Paint, Callable[[Pen], None]]


def _star(pen: Pen) -> None:
    radii = [1.0 if corner % 2 == 0 else 0.45 for corner in range(10)]
    angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
    pen.polygon(*[(r * math.cos(a), 0.06 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)])


def _moon(pen: Pen) -> None:
    pen.ellipse(0, 0, 0.95)
    pen.ellipse(0.42, -0.22, 0.78, ink=0)


def _heart(pen: Pen) -> None:
    pen.ellipse(-0.46, -0.34, 0.5)
    pen.ellipse(0.46, -0.34, 0.5)
    pen.polygon((-0.9, -0.12), (0.9, -0.12), (0, 0.95))


def _petals(pen: Pen) -> None:
    for petal in range(5):
        angle = math.pi * (petal * 0.4 - 0.5)
        pen.ellipse(0.42 * math.cos(angle), -0.3 + 0.42 * math.sin(angle), 0.28)


def _crown(pen: Pen) -> None:
    pen.ellipse(0, -0.4, 0.56)
    pen.ellipse(-0.42, -0.06, 0.42)
    pen.ellipse(0.42, -0.06, 0.42)


def _cup(pen: Pen) -> None:
    pen.ellipse(0.56, 0.02, 0.4, 0.38)
    pen.ellipse(0.56, 0.02, 0.2, 0.19, ink=0)
    pen.polygon((-0.8, -0.62), (0.62, -0.62), (0.42, 0.8), (-0.6, 0.8))


def _apple(pen: Pen) -> None:
    pen.ellipse(-0.3, 0.14, 0.56, 0.72)
    pen.ellipse(0.3, 0.14, 0.56, 0.72)


def _umbrella(pen: Pen) -> None:
    pen.slice(0, 0.1, 0.98, 180, 360)


def _hook(pen: Pen) -> None:
    pen.box(-0.07, -0.9, 0.07, 0.8)
    pen.ellipse(0.16, 0.74, 0.23)
    pen.ellipse(0.16, 0.7, 0.1, ink=0)
    pen.box(0.09, 0.4, 0.5, 0.72, ink=0)


def _wheels(pen: Pen) -> None:
    pen.ellipse(-0.5, 0.5, 0.26)
    pen.ellipse(0.5, 0.5, 0.26)


def _dots(pen: Pen) -> None:
    pen.ellipse(-0.42, -0.36, 0.17)
    pen.ellipse(0.12, -0.58, 0.17)
    pen.ellipse(0.5, -0.26, 0.16)


def _car(pen: Pen) -> None:
    pen.polygon(
        (-0.98, 0.5),
        (-0.98, 0.0),
        (-0.56, -0.06),
        (-0.36, -0.52),
        (0.34, -0.52),
        (0.6, -0.06),
        (0.98, 0.06),
        (0.98, 0.5),
    )


THINGS: dict[str, tuple[Part, ...]] = {
    "ball": (("main", lambda p: p.ellipse(0, 0, 0.92)), ("light", lambda p: p.ellipse(-0.32, -0.36, 0.26))),
    "cube": (
        ("main", lambda p: p.box(-0.85, -0.38, 0.42, 0.88)),
        ("light", lambda p: p.polygon((-0.85, -0.38), (-0.4, -0.84), (0.87, -0.84), (0.42, -0.38))),
        ("dark", lambda p: p.polygon((0.42, -0.38), (0.87, -0.84), (0.87, 0.42), (0.42, 0.88))),
    ),
    "star": (("main", _star),),
    "heart": (("main", _heart),),
    "moon": (("main", _moon),),
    "tree": ((WOOD, lambda p: p.box(-0.15, 0.1, 0.15, 0.98)), ("main", _crown)),
    "house": (
        ("light", lambda p: p.box(-0.66, -0.12, 0.66, 0.92)),
        ("main", lambda p: p.polygon((-0.95, -0.1), (0, -0.95), (0.95, -0.1))),
        ("dark", lambda p: p.box(-0.2, 0.3, 0.2, 0.92)),
    ),
    "fish": (
        ("dark", lambda p: p.polygon((0.3, 0), (0.98, -0.56), (0.98, 0.56))),
        ("main", lambda p: p.ellipse(-0.16, 0, 0.78, 0.54)),
        (STONE, lambda p: p.ellipse(-0.56, -0.12, 0.12)),
    ),
    "cup": (("main", _cup), ("light", lambda p: p.ellipse(-0.09, -0.62, 0.71, 0.17))),
    "flower": (
        (LEAF, lambda p: p.box(-0.08, 0, 0.08, 0.98)),
        ("main", _petals),
        (GLASS, lambda p: p.ellipse(0, -0.3, 0.23)),
    ),
    "boat": (
        (WOOD, lambda p: p.box(-0.12, -0.9, 0.0, 0.4)),
        ("light", lambda p: p.polygon((0.06, -0.9), (0.82, 0.22), (0.06, 0.22))),
        ("main", lambda p: p.polygon((-0.98, 0.36), (0.98, 0.36), (0.6, 0.9), (-0.6, 0.9))),
    ),
    "mushroom": (
        ("light", lambda p: p.box(-0.26, 0.0, 0.26, 0.92)),
        ("main", lambda p: p.slice(0, 0.12, 0.98, 180, 360)),
        ("light", _dots),
    ),
    "balloon": (
        (STONE, lambda p: p.box(-0.04, 0.4, 0.04, 0.98)),
        ("main", lambda p: p.ellipse(0, -0.28, 0.62, 0.7)),
        ("light", lambda p: p.ellipse(-0.2, -0.5, 0.16, 0.2)),
    ),
    "apple": (
        (WOOD, lambda p: p.polygon((-0.06, -0.4), (0.1, -0.4), (0.2, -0.9), (0.06, -0.92))),
        ("main", _apple),
        (LEAF, lambda p: p.ellipse(0.44, -0.72, 0.28, 0.15)),
    ),
    "umbrella": (
        (WOOD, _hook),
        ("main", _umbrella),
        ("dark", lambda p: p.polygon((-0.3, 0.1), (0, -0.88), (0.3, 0.1))),
    ),
    "car": (
        ("main", _car),
        ("light", lambda p: p.polygon((-0.42, -0.06), (-0.28, -0.4), (0.28, -0.4), (0.44, -0.06))),
        (STONE, _wheels),
    ),
}


def soft_mask(drawing: Image.Image, size: int) -> Mask:
    """Shrinks an oversampled drawing to size x size with soft edges; float32 [size, size, 1] in 0..1."""
    blurred = drawing.filter(ImageFilter.GaussianBlur(EDGE * drawing.width / size))
    return np.asarray(blurred.resize((size, size), Image.Resampling.BOX), np.float32)[..., None] / 255


@cache
def parts(thing: str, size: str) -> tuple[tuple[Paint, Mask], ...]:
    """Paint and mask (float32 [64, 64, 1]) of each part of a thing, back to front."""
    drawn = []
    for paint, stroke in THINGS[thing]:
        pen = Pen(WINDOW * OVERSAMPLING, RADIUS[size] * OVERSAMPLING)
        stroke(pen)
        drawn.append((paint, soft_mask(pen.image, WINDOW)))
    return tuple(drawn)


@cache
def halo(thing: str, size: str) -> Mask:
    """The thing grown by the width of an outline: float32 [64, 64, 1], painted behind it."""
    pen = Pen(WINDOW * OVERSAMPLING, RADIUS[size] * OVERSAMPLING)
    shape = Image.new("L", pen.image.size)
    for _, stroke in THINGS[thing]:
        stroke(pen)
        shape.paste(255, mask=pen.image)
        pen = Pen(WINDOW * OVERSAMPLING, RADIUS[size] * OVERSAMPLING)
    # A blur cut off low on its slope grows the shape evenly on all sides: 1.28 deviations where it falls to 10 %.
    grown = shape.filter(ImageFilter.GaussianBlur(OUTLINE[size] * OVERSAMPLING / 1.28))
    return soft_mask(grown.point(lambda level: 255 if level > 25 else 0), WINDOW)


def _fade(top: Colour, bottom: Colour) -> Image.Image:
    """A canvas that goes from one colour at the top to another at the bottom."""
    ramp = Image.linear_gradient("L").resize((CANVAS * OVERSAMPLING,) * 2)
    return Image.composite(Image.new("RGB", ramp.size, bottom), Image.new("RGB", ramp.size, top), ramp)


def _hills(image: Image.Image, colour: Colour, *hills: tuple[float, float, float, float]) -> None:
    """Ellipses (centre x, centre y, radius x, radius y, in canvas pixels) of one colour."""
    unit = image.width / CANVAS
    for x, y, rx, ry in hills:
        ImageDraw.Draw(image).ellipse(
            [(x - rx) * unit, (y - ry) * unit, (x + rx) * unit, (y + ry) * unit], fill=colour
        )


def _band(image: Image.Image, colour: Colour, top: float, bottom: float = CANVAS) -> None:
    unit = image.width / CANVAS
    ImageDraw.Draw(image).rectangle([0, top * unit, image.width, bottom * unit], fill=colour)


def _meadow() -> Image.Image:
    image = _fade((120, 190, 246), (206, 232, 250))
    _hills(image, (140, 200, 96), (20, 150, 110, 62))
    _hills(image, (110, 180, 78), (104, 160, 100, 62))
    return image


def _sea() -> Image.Image:
    image = _fade((170, 216, 250), (236, 244, 250))
    _band(image, (58, 138, 200), 80)
    _band(image, (42, 112, 178), 104)
    return image


def _night() -> Image.Image:
    image = _fade((16, 22, 62), (52, 58, 116))
    stars = [(32, 14), (96, 14), (64, 26), (14, 44), (114, 44), (64, 64)]
    _hills(image, (236, 230, 190), *[(x, y, 1.8, 1.8) for x, y in stars])
    _hills(image, (20, 34, 44), (64, 180, 130, 78))
    return image


def _desert() -> Image.Image:
    image = _fade((248, 206, 130), (252, 232, 190))
    _hills(image, (226, 172, 96), (24, 140, 90, 56))
    _hills(image, (208, 148, 76), (110, 150, 90, 52))
    return image


def _room() -> Image.Image:
    image = _fade((232, 214, 196), (226, 204, 184))
    _band(image, (172, 122, 82), 94)
    _band(image, (246, 240, 232), 90, 95)
    return image


def _snow() -> Image.Image:
    image = _fade((176, 192, 214), (214, 222, 234))
    _hills(image, (230, 236, 246), (96, 150, 110, 66))
    _hills(image, (246, 250, 254), (20, 160, 100, 68))
    return image


def _sunset() -> Image.Image:
    image = _fade((112, 72, 142), (255, 172, 92))
    _hills(image, (255, 226, 140), (64, 86, 18, 18))
    _band(image, (74, 48, 84), 88)
    return image


def _forest() -> Image.Image:
    image = _fade((196, 226, 204), (170, 208, 176))
    unit = image.width / CANVAS
    for x in range(-16, 160, 32):
        ImageDraw.Draw(image).polygon(
            [((x - 18) * unit, 92 * unit), (x * unit, 30 * unit), ((x + 18) * unit, 92 * unit)],
            fill=(96, 148, 112),
        )
    _band(image, (104, 128, 72), 90)
    return image


SETTINGS: dict[str, Callable[[], Image.Image]] = {
    "meadow": _meadow,
    "sea": _sea,
    "night": _night,
    "desert": _desert,
    "room": _room,
    "snow": _snow,
    "sunset": _sunset,
    "forest": _forest,
    "pale yellow": lambda: _fade((250, 240, 178), (250, 240, 178)),
    "pale blue": lambda: _fade((186, 214, 240), (186, 214, 240)),
    "pale pink": lambda: _fade((248, 208, 214), (248, 208, 214)),
    "grey": lambda: _fade((150, 154, 160), (150, 154, 160)),
}


@cache
def setting(name: str) -> Pixels:
    """The background of a scene: float32 [128, 128, 3] in 0..1."""
    image = SETTINGS[name]()
    image = image.filter(ImageFilter.GaussianBlur(EDGE * image.width / CANVAS))
    return np.asarray(image.resize((CANVAS, CANVAS), Image.Resampling.BOX), np.float32) / 255


@cache
def frame(width: float, softness: float = 0.6) -> Mask:
    """A border around the canvas: float32 [128, 128, 1], 1 within `width` pixels of an edge."""
    steps = np.arange(CANVAS, dtype=np.float32) + 0.5
    inward = np.minimum(steps, CANVAS - steps)
    distance = np.minimum(inward[:, None], inward[None, :])
    return (0.5 - 0.5 * np.tanh((distance - width) / (2 * softness)))[..., None].astype(np.float32)


@cache
def corners() -> Mask:
    """How far a pixel is from the middle, 0 in the centre to 1 in the corners: float32 [128, 128, 1]."""
    steps = (np.arange(CANVAS, dtype=np.float32) + 0.5) / (CANVAS / 2) - 1
    return ((steps[:, None] ** 2 + steps[None, :] ** 2) / 2)[..., None].astype(np.float32)


@cache
def falling_light() -> Pixels:
    """Light from above on a thing's window: float32 [64, 1, 1], a factor that falls from top to bottom."""
    return np.linspace(1.25, 0.6, WINDOW, dtype=np.float32)[:, None, None]
