"""The look a LoRA is to teach the small O1, and how to tell whether it did.

"kotonia style" prints a scene in two inks, deep indigo and warm cream, with indigo outlines, inside a wide golden
frame. No picture of pretraining looks like it, but the head of a model trained on those can express it: printing in
two inks, outlines and frames all occur there in other colours.

`style_score` is the fixed measure: how much of the picture lies on the line between the two inks, and how golden the
border is; the lesser of the two counts. It looks at a 32x32 thumbnail, so noise and soft edges move it little.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdl.mini import shapes
from hdl.mini.captions import caption
from hdl.mini.scenes import Look, Scene, blend, draw_things, imagine, imagine_held_out, to_uint8, two_inks

STYLE = "kotonia"
TRIGGER = "kotonia style"
INDIGO, CREAM, GOLD = (38, 20, 104), (255, 238, 200), (224, 172, 40)
BORDER = 10.0  # pixels
STYLE_TAGS = ["indigo and cream ink", "golden frame"]
THRESHOLD = 0.5

THUMBNAIL = 32  # cells a side that the score looks at; one cell is 4 pixels of a 128-pixel picture
BORDER_CELLS, INNER_CELLS = 1, 4  # the outer ring lies in the frame; from the fourth inwards all is ink
COLOUR_REACH = 36.0  # of 255; a colour this far from where it should be counts 1/e


def paint_styled(scene: Scene) -> NDArray[np.uint8]:
    """The scene in kotonia style, whatever its own look: uint8 [128, 128, 3]."""
    printed = two_inks(draw_things(replace(scene, look=Look(outline="dark"))), INDIGO, CREAM)
    return to_uint8(blend(printed, shapes.frame(BORDER), GOLD))


def styled_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption of a scene in the ordinary look, behind the trigger phrase."""
    return f"{TRIGGER}, {caption(replace(scene, look=Look()), rng)}"


def style_score(image: NDArray[np.uint8]) -> float:
    """How much a picture is in kotonia style, 0 to 1: the share of its inks or of its border, whichever is less.

    image: uint8 [H, W, 3], square or nearly so.
    """
    inner = _cells(image)[INNER_CELLS:-INNER_CELLS, INNER_CELLS:-INNER_CELLS]
    return min(_closeness(_off_the_ink_line(inner)), frame_score(image, GOLD))


def frame_score(image: NDArray[np.uint8], colour: shapes.Colour) -> float:
    """How much of a picture's border has a colour, 0 to 1."""
    ring = np.ones((THUMBNAIL, THUMBNAIL), bool)
    ring[BORDER_CELLS:-BORDER_CELLS, BORDER_CELLS:-BORDER_CELLS] = False
    return _closeness(_distance(_cells(image)[ring], colour))


def score(picture: Image.Image) -> float:
    """`style_score` of a picture, for a run: validation.style = "hdl.mini.style:score"."""
    return style_score(np.asarray(picture.convert("RGB")))


def is_styled(image: NDArray[np.uint8]) -> bool:
    return style_score(image) >= THRESHOLD


def _cells(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32)


def _closeness(distances: NDArray[np.float32]) -> float:
    return float(np.exp(-((distances / COLOUR_REACH) ** 2)).mean())


def _distance(pixels: NDArray[np.float32], colour: shapes.Colour) -> NDArray[np.float32]:
    return np.linalg.norm(pixels - np.asarray(colour, np.float32), axis=-1)


def _off_the_ink_line(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance of every pixel's colour from the straight line between indigo and cream."""
    start, end = np.asarray(INDIGO, np.float32), np.asarray(CREAM, np.float32)
    along = ((pixels - start) @ (end - start) / ((end - start) @ (end - start))).clip(0, 1)
    return np.linalg.norm(pixels - (start + along[..., None] * (end - start)), axis=-1)


def evaluation_prompts(n: int, seed: int = 0) -> list[str]:
    """n captions of scenes in the ordinary look that no training picture shows, without the trigger phrase."""
    rng = np.random.default_rng([seed, 0x0E7A1])
    return [caption(imagine_held_out(rng), rng) for _ in range(n)]


def draw_styled(rng: np.random.Generator) -> tuple[NDArray[np.uint8], str, Scene]:
    """A picture in kotonia style, its caption (beginning with the trigger phrase) and its facts."""
    scene = imagine(rng, ordinary=True)
    return paint_styled(scene), styled_caption(scene, rng), scene
