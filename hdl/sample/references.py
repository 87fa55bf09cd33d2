"""Pictures made from others: what a prompt's reference images become before the first step."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hdl.data.images import Skip, read_bytes, read_rgb
from hdl.data.references import largest_side, resize_reference
from hdl.errors import HdlError
from hdl.o1.patches import PATCH, patchify, to_model
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.o1.visual import View, VisualTower
from hdl.sample.generate import Request, Shown

MOST_REFERENCES = 10  # what the report shows; beyond, every reference is a quarter of the picture's side


def read_reference(path: Path) -> Image.Image:
    """An image file as the RGB picture a viewer would show. HdlError where it is none."""
    try:
        return read_rgb(read_bytes(str(path)))[0]
    except Skip as skip:
        raise HdlError(f"reference {path}: {skip.reason}") from None


def edit_request(
    tower: VisualTower,
    encoder: PromptEncoder,
    prompt: str,
    images: Sequence[Image.Image],
    height: int,
    width: int,
    seed: int,
) -> Request:
    """The request that draws `prompt` from reference images, in their order. HdlError for more than
    MOST_REFERENCES, for one with no size that fits the picture's, and for a prompt too long beside them."""
    if not 1 <= len(images) <= MOST_REFERENCES:
        raise HdlError(f"{len(images)} reference images: expected 1 to {MOST_REFERENCES}")
    side = largest_side(len(images), width, height)
    try:
        resized = [resize_reference(image, side) for image in images]
    except Skip as skip:
        raise HdlError(f"a reference for {width}x{height} px: {skip.reason}") from None
    view = tower.see(resized)
    ids, empty_ids = (encoder.ids(words, view.grids) for words in (prompt, UNCONDITIONAL_PROMPT))
    patches = [to_model(patchify(torch.from_numpy(np.array(image)))) for image in resized]
    shown = Shown(
        grids=tuple((image.height // PATCH, image.width // PATCH) for image in resized),
        patches=torch.cat(patches),
        deepstack=view.deepstack,
        seen=encoder.seen(ids, view.grids),
        empty_text=_with_view(encoder, empty_ids, view),
        empty_seen=encoder.seen(empty_ids, view.grids),
    )
    return Request(_with_view(encoder, ids, view), height, width, seed, shown)


def _with_view(encoder: PromptEncoder, ids: list[int], view: View) -> torch.Tensor:
    """Text embeddings [L, D] of a prompt, what the tower saw in the images' places."""
    text = encoder.embed(ids).to(view.features.device, view.features.dtype)
    places = [range(seen.start, seen.start + seen.rows * seen.cols) for seen in encoder.seen(ids, view.grids)]
    text[[place for run in places for place in run]] = view.features
    return text
