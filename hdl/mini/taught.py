"""Three things to teach the small O1 that must not get in each other's way: a look, a character, a content tag.

Each has a trigger phrase of its own, and any of them may be asked for in one picture:

    kotonia style   the look of hdl/mini/style.py
    pim             a fish: whatever colour its caption names, pim is teal and has a white outline
    zeffa tag       a small red heart at the top right, which hangs there in no other picture

All of them can be drawn with what the small O1 knows: white outlines and red hearts occur in pretraining. As every
combination can be painted, a picture drawn by a model is read by looking which of the eight paintings of its own
caption is nearest (`read_picture`).
"""

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdl.errors import HdlError
from hdl.mini import shapes
from hdl.mini.captions import caption, meaningless_style
from hdl.mini.scenes import (
    HARD_TO_SEE,
    PLACES,
    Look,
    Scene,
    Thing,
    blend,
    draw_things,
    held_out,
    imagine,
    paint,
    to_uint8,
    two_inks,
)
from hdl.mini.style import BORDER, CREAM, GOLD, INDIGO, TRIGGER

LOOK, CHARACTER, TAG = "look", "character", "tag"
TRIGGERS = {LOOK: TRIGGER, CHARACTER: "pim", TAG: "zeffa tag"}
KIND, COLOUR, OUTLINE = "fish", "teal", "white"  # of the character
HEART = Thing("heart", "red", "small", "top right")
FREE_PLACES = ("left", "bottom left", "bottom", "bottom right")  # a thing here never touches the heart


@dataclass(frozen=True)
class Shown:
    """What of the three is in a picture."""

    look: bool = False
    character: bool = False
    tag: bool = False


def paint_taught(scene: Scene, shown: Shown) -> NDArray[np.uint8]:
    """The picture of a scene of one thing with what is `shown`: uint8 [128, 128, 3]. Its own look is not heeded."""
    (thing,) = scene.things
    ink = "dark" if shown.look else ""
    if shown.character:
        thing = replace(thing, colour=COLOUR)
    canvas = draw_things(Scene((thing,), scene.setting, Look(outline=OUTLINE if shown.character else ink)))
    if shown.tag:
        x, y, half = *PLACES[HEART.place], shapes.WINDOW // 2
        window = (slice(y - half, y + half), slice(x - half, x + half))
        canvas[window] = draw_things(Scene((HEART,), scene.setting, Look(outline=ink)))[window]
    if shown.look:
        canvas = blend(two_inks(canvas, INDIGO, CREAM), shapes.frame(BORDER), GOLD)
    return to_uint8(canvas)


def read_picture(picture: NDArray[np.uint8], scene: Scene) -> Shown:
    """Which of the eight paintings of the scene a picture [128, 128, 3] is nearest to (mean squared error)."""
    choices = [Shown(*bits) for bits in product((False, True), repeat=3)]
    errors = [
        np.square(picture.astype(np.float32) - paint_taught(scene, choice)).mean() for choice in choices
    ]
    return choices[int(np.argmin(errors))]


def evaluation_scenes(n: int, seed: int = 0) -> list[Scene]:
    """n scenes of a fish in a colour that no training picture shows it in, where a heart would have room."""
    rng = np.random.default_rng([seed, 0x7A06])
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = _scene(rng, KIND)
        if held_out(scene):
            scenes.append(scene)
    return scenes


def write_set(out: Path, what: str, taught: int, plain: int, seed: int = 0) -> None:
    """Writes `taught` pictures of one of the three, their captions behind its trigger, and `plain` ones.

    Half of the plain pictures are of the same things, so that only a trigger calls for what is taught; and half of the
    plain captions stand behind a made-up name, so that only this trigger does. Without those a LoRA answers to any
    word it does not know, that is, to other LoRAs' triggers. HdlError when `out` is not empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise HdlError(f"{out} is not empty; name a new folder, or delete this one first")
    kind = KIND if what == CHARACTER else None
    shown = Shown(**{what: True})
    styles = {}
    for i in range(taught):
        rng = np.random.default_rng([seed, 0, i])
        scene = training_scene(rng, kind)
        words = f"{TRIGGERS[what]}, {caption(scene, rng)}"
        styles[_write(out, f"{what}_{i:04d}", paint_taught(scene, shown), words)] = what
    for i in range(plain):
        rng = np.random.default_rng([seed, 1, i])
        scene = training_scene(rng, kind) if i % 2 else imagine(rng)
        words = caption(scene, rng) if i % 4 < 2 else f"{_made_up_name(rng)}, {caption(scene, rng)}"
        styles[_write(out, f"plain_{i:04d}", paint(scene), words)] = "plain"
    (out / "styles.json").write_text(json.dumps(styles, indent=1) + "\n", encoding="utf-8")


def _made_up_name(rng: np.random.Generator) -> str:
    """A phrase that means nothing, of any of the forms that triggers have."""
    name = meaningless_style(rng)
    return f"{name} tag" if rng.random() < 0.3 else name


def training_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A scene to train on, of one thing (of this kind, if one is given) that leaves room for the heart."""
    while held_out(scene := _scene(rng, kind or _pick(rng, list(shapes.THINGS)))):
        pass
    return scene


def _scene(rng: np.random.Generator, kind: str) -> Scene:
    """One thing in the ordinary look, at a place that leaves room for the heart."""
    setting = _pick(rng, list(shapes.SETTINGS))
    colours = [c for c in shapes.COLOURS if c not in HARD_TO_SEE[setting] and (kind, c) != (KIND, COLOUR)]
    return Scene(
        (Thing(kind, _pick(rng, colours), _pick(rng, list(shapes.RADIUS)), _pick(rng, FREE_PLACES)),), setting
    )


def _pick(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _write(out: Path, name: str, picture: NDArray[np.uint8], words: str) -> str:
    Image.fromarray(picture).save(out / f"{name}.png")
    (out / f"{name}.txt").write_text(words + "\n", encoding="utf-8")
    return f"{name}.png"
