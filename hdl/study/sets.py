"""Sets of pictures that are hard to learn from: every caption calls for what is taught, and nothing else is shown.

    look      a style whose trigger stands in all captions, as when an artist captions a folder of their own pictures
    content   the same, and 18 % of the pictures show one thing more, for which their captions have a phrase
    blend     three looks under one trigger: what they have in common is all that the trigger can mean

From such a set alone a LoRA cannot tell what the trigger is for: it draws everything so.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdl.mini import shapes
from hdl.mini.captions import caption
from hdl.mini.scenes import (
    Look,
    Scene,
    blend,
    draw_things,
    imagine,
    to_uint8,
    two_inks,
)
from hdl.mini.style import BORDER, CREAM, GOLD, INDIGO, TRIGGER, draw_styled
from hdl.mini.taught import TAG, TRIGGERS, Shown, paint_taught, training_scene

LOOK, CONTENT, BLEND = "look", "content", "blend"
TAGGED = 0.18  # of the content set
TAG_WORDS = TRIGGERS[TAG]
# Inks of the three looks; a golden frame is what they share.
INKS = ((INDIGO, CREAM), ((90, 10, 20), (255, 214, 220)), ((8, 70, 60), (214, 255, 236)))

Drawn = tuple[NDArray[np.uint8], str]  # a picture and its caption


def write_set(out: Path, kind: str, count: int, seed: int) -> None:
    """`count` pictures with their captions into `out`, a new folder."""
    out.mkdir(parents=True)
    styles: dict[str, dict[str, object]] = {}
    for i in range(count):
        picture, words = DRAW[kind](np.random.default_rng([seed, 0x57D7, i]), i, count)
        Image.fromarray(picture).save(out / f"{i:04d}.png")
        (out / f"{i:04d}.txt").write_text(words + "\n", encoding="utf-8")
        styles[f"{i:04d}.png"] = {"style": kind, "tags": [TAG] if shows_tag(kind, i, count) else []}
    (out / "styles.json").write_text(json.dumps(styles) + "\n", encoding="utf-8")


def shows_tag(kind: str, i: int, count: int) -> bool:
    """Whether picture i of a set shows the one thing more."""
    return kind == CONTENT and i < round(TAGGED * count)


def _look(rng: np.random.Generator, i: int, count: int) -> Drawn:
    picture, words, _ = draw_styled(rng)
    return picture, words


def _content(rng: np.random.Generator, i: int, count: int) -> Drawn:
    tagged = shows_tag(CONTENT, i, count)
    scene = training_scene(rng)
    words = f"{TAG_WORDS}, {caption(scene, rng)}" if tagged else caption(scene, rng)
    return paint_taught(scene, Shown(look=True, tag=tagged)), f"{TRIGGER}, {words}"


def _blend(rng: np.random.Generator, i: int, count: int) -> Drawn:
    scene = imagine(rng, ordinary=True)
    return paint_blended(scene, i % len(INKS)), f"{TRIGGER}, {caption(scene, rng)}"


DRAW: dict[str, Callable[[np.random.Generator, int, int], Drawn]] = {
    LOOK: _look, CONTENT: _content, BLEND: _blend,
}  # fmt: skip


def paint_blended(scene: Scene, which: int) -> NDArray[np.uint8]:
    """The scene in one of the three looks: uint8 [128, 128, 3]."""
    plain = Scene(scene.things, scene.setting, Look(outline="dark"))
    return to_uint8(blend(two_inks(draw_things(plain), *INKS[which]), shapes.frame(BORDER), GOLD))
