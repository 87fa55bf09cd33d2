"""Captioned 128x128 pictures from a seed: what a small O1 learns to draw.

A scene is first imagined (facts, no pixels), then painted, then put into words. Everything that shows is named in
the caption or follows from it, so that a small model has little to guess: what no caption names (the shape of a
hill, where a star twinkles) is the same in every picture.

The looks change tone, palette, outline and borders, alone and together, so that the head of a model trained on
these pictures can express more than flat fills. One pair in ten of thing and colour is held out of every picture
drawn for training: `held_out` tells, and the prompts a model is judged by use only those.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from hdl.mini import shapes
from hdl.mini.shapes import COLOURS, WINDOW, Colour, Mask, Pixels

# Where a thing's centre stands, in pixels: always on a corner of the patch grid.
PLACES = {
    "top left": (32, 32),
    "top": (64, 32),
    "top right": (96, 32),
    "left": (32, 64),
    "middle": (64, 64),
    "right": (96, 64),
    "bottom left": (32, 96),
    "bottom": (64, 96),
    "bottom right": (96, 96),
}
GROUND_PLACES = ("left", "middle", "right", "bottom left", "bottom", "bottom right")
HANGING = ("moon", "star", "balloon", "heart", "umbrella", "ball", "fish")  # things that may be high up
PAIRS = (
    ("left", "right"),
    ("bottom left", "bottom right"),
    ("top left", "bottom right"),
    ("bottom left", "top right"),
    ("left", "bottom right"),
    ("bottom left", "right"),
)  # far enough apart that two things never touch
HARD_TO_SEE = {
    "meadow": ("green",),
    "sea": ("blue",),
    "night": ("black", "blue"),
    "desert": ("orange", "yellow"),
    "room": ("white",),
    "snow": ("white",),
    "sunset": ("orange", "brown", "purple"),
    "forest": ("green",),
    "pale yellow": ("yellow", "white"),
    "pale blue": ("white",),
    "pale pink": ("white", "pink"),
    "grey": ("black",),
}  # colours that would melt into a setting

# Two inks: what is dark in a picture, what is light. The style set's own pair is not among them.
TWO_INKS: dict[str, tuple[Colour, Colour]] = {
    "black and white": ((0, 0, 0), (255, 255, 255)),
    "sepia": ((58, 36, 22), (226, 200, 164)),
    "green ink": ((12, 60, 40), (226, 246, 226)),
    "red ink": ((96, 14, 24), (255, 226, 222)),
    "blue ink": ((14, 40, 108), (226, 238, 252)),
}
TONES = (*TWO_INKS, "pastel", "dim")
LINES: dict[str, Colour] = {"dark": (26, 24, 32), "white": (252, 252, 250)}
SURFACES = ("shaded", "watercolour")
FRAMES: dict[str, Colour] = {
    "white": (250, 250, 248),
    "black": (28, 28, 32),
    "red": (190, 44, 44),
    "blue": (44, 84, 180),
    "wooden": (128, 86, 52),
}
FRAME_WIDTH = 8.0  # pixels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Thing:
    kind: str  # a key of shapes.THINGS
    colour: str  # a key of shapes.COLOURS
    size: str  # small, big
    place: str  # a key of PLACES


@dataclass(frozen=True)
class Look:
    """How a scene is rendered; the empty string is the ordinary way."""

    tone: str = ""  # one of TONES
    outline: str = ""  # a key of LINES
    surface: str = ""  # one of SURFACES
    light: str = ""  # vignette
    frame: str = ""  # a key of FRAMES

    def words(self) -> list[str]:
        """The look as tags: ["sepia", "dark outline", "red frame"]."""
        outline = f"{self.outline} outline" if self.outline else ""
        frame = f"{self.frame} frame" if self.frame else ""
        return [word for word in (self.tone, outline, self.surface, self.light, frame) if word]


@dataclass(frozen=True)
class Scene:
    """The facts of one picture."""

    things: tuple[Thing, ...]
    setting: str  # a key of shapes.SETTINGS
    look: Look = Look()


def held_out(scene: Scene) -> bool:
    """True when a thing of the scene has a colour that training never shows it in."""
    return any(crc32(f"{thing.colour} {thing.kind}".encode()) % 10 == 0 for thing in scene.things)


def imagine(rng: np.random.Generator, ordinary: bool = False) -> Scene:
    """A scene to train on: never a held-out pair. ordinary: in the ordinary look only."""
    while held_out(scene := _imagine(rng, ordinary)):
        pass
    return scene


def imagine_held_out(rng: np.random.Generator) -> Scene:
    """One thing in a colour that training never shows it in, in the ordinary look."""
    while not held_out(scene := _imagine(rng, ordinary=True)) or len(scene.things) > 1:
        pass
    return scene


def _imagine(rng: np.random.Generator, ordinary: bool) -> Scene:
    setting = _pick(rng, shapes.SETTINGS)
    if rng.random() < 0.3:
        things = tuple(_thing(rng, setting, place) for place in PAIRS[rng.integers(len(PAIRS))])
    else:
        thing = _thing(rng, setting, _pick(rng, GROUND_PLACES))
        things = (replace(thing, place=_pick(rng, PLACES)) if thing.kind in HANGING else thing,)
    return Scene(things, setting, Look() if ordinary else _look(rng))


def _thing(rng: np.random.Generator, setting: str, place: str) -> Thing:
    colours = [colour for colour in COLOURS if colour not in HARD_TO_SEE[setting]]
    return Thing(_pick(rng, shapes.THINGS), _pick(rng, colours), _pick(rng, shapes.RADIUS), place)


def _look(rng: np.random.Generator) -> Look:
    """Three times in ten the ordinary look, else one or more others at once."""
    return Look(
        tone=_pick(rng, TONES) if rng.random() < 0.3 else "",
        outline=_pick(rng, LINES) if rng.random() < 0.25 else "",
        surface=_pick(rng, SURFACES) if rng.random() < 0.2 else "",
        light="vignette" if rng.random() < 0.1 else "",
        frame=_pick(rng, FRAMES) if rng.random() < 0.2 else "",
    )


def _pick(rng: np.random.Generator, names: Iterable[str]) -> str:
    options = list(names)
    return options[rng.integers(len(options))]


def paint(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene: uint8 [128, 128, 3]."""
    look = scene.look
    canvas = in_tone(draw_things(scene), look.tone)
    if look.surface == "watercolour":
        canvas = _watercolour(canvas)
    if look.light == "vignette":
        canvas = canvas * (1 - 0.7 * shapes.corners() ** 1.5)
    if look.frame:
        canvas = blend(canvas, shapes.frame(FRAME_WIDTH), FRAMES[look.frame])
    return to_uint8(canvas)


def draw_things(scene: Scene) -> Pixels:
    """Setting and things, with their outline and shading but without tone or border: [128, 128, 3] in 0..1."""
    canvas = shapes.setting(scene.setting).copy()
    for thing in scene.things:
        x, y = PLACES[thing.place]
        window = canvas[y - WINDOW // 2 : y + WINDOW // 2, x - WINDOW // 2 : x + WINDOW // 2]
        if scene.look.outline:
            window[:] = blend(window, shapes.halo(thing.kind, thing.size), LINES[scene.look.outline])
        for part, mask in shapes.parts(thing.kind, thing.size):
            colour = shapes.shade(part, COLOURS[thing.colour])
            if scene.look.surface == "shaded":
                colour = np.minimum(colour * shapes.falling_light(), 1)
            window[:] = window * (1 - mask) + mask * colour
    return canvas


def blend(canvas: Pixels, mask: Mask, colour: Colour) -> Pixels:
    """The canvas with a colour laid over it where the mask (0..1) says so."""
    return canvas * (1 - mask) + mask * (np.asarray(colour, np.float32) / 255)


def two_inks(canvas: Pixels, dark: Colour, light: Colour) -> Pixels:
    """The canvas printed in two inks: its brightness blends from one to the other."""
    inks = np.asarray([dark, light], np.float32) / 255
    return inks[0] + (canvas @ LUMA)[..., None] * (inks[1] - inks[0])


def in_tone(canvas: Pixels, tone: str) -> Pixels:
    if tone in TWO_INKS:
        return two_inks(canvas, *TWO_INKS[tone])
    if tone == "pastel":
        return canvas * 0.5 + 0.5
    if tone == "dim":
        return canvas * np.array([0.42, 0.46, 0.6], np.float32)
    return canvas


def _watercolour(canvas: Pixels) -> Pixels:
    """Soft edges, thinned colours, fading to white paper at the border."""
    blurred = Image.fromarray(to_uint8(canvas)).filter(ImageFilter.GaussianBlur(1.8))
    washed = np.asarray(blurred, np.float32) / 255 * 0.8 + 0.2
    paper = shapes.frame(5.0, softness=2.5)
    return washed * (1 - paper) + paper


def to_uint8(canvas: Pixels) -> NDArray[np.uint8]:
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)
