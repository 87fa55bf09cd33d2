"""How much of the look is in a picture, as the user says it is to be measured.

Two ways. A function of the user's, "package.module:function", that is given a picture and returns a number. Or an image
encoder on this machine (DINOv2, DINOv3, CLIP or SigLIP, whatever transformers' AutoModel loads) with a folder of
pictures in the look: a picture's score is the cosine between its embedding and the mean of theirs.

Scores should lie between 0 and 1, so that a gate, the difference of two of them, can be weighed against a drift.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hdl.errors import HdlError

Score = Callable[[Image.Image], float]
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
AT_ONCE = 16


def open_score(style: str, references: Path | None, device: torch.device) -> Score:
    """style, references: of the run's [validation]. HdlError for what cannot be called, opened or read."""
    if Path(style).is_dir():
        if references is None:
            raise HdlError(
                f"validation.style {style} is an image encoder, which needs validation.style_references: a folder of "
                "pictures in the look"
            )
        return EncoderScore(Path(style), references, device)
    return _function(style)


class EncoderScore:
    """The cosine between a picture and a set of them, under an image encoder that lies in a folder here."""

    def __init__(self, folder: Path, references: Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel  # seconds, which other runs need not wait for

        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise HdlError(
                f"validation.style {folder}: no image encoder loads from there ({error})"
            ) from None
        model = getattr(model, "vision_model", model)  # of models that read text, too
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.device = device
        pictures = _pictures(references)
        parts = [self._embed(pictures[i : i + AT_ONCE]) for i in range(0, len(pictures), AT_ONCE)]
        self.mean = torch.nn.functional.normalize(torch.cat(parts).mean(dim=0), dim=0)

    def __call__(self, picture: Image.Image) -> float:
        return float(self._embed([picture])[0] @ self.mean)

    @torch.no_grad()
    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float32 [N, D], each of length 1."""
        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").to(
            self.device
        )
        out = self.model(pixel_values=inputs["pixel_values"])
        pooled = (
            out.pooler_output
            if getattr(out, "pooler_output", None) is not None
            else out.last_hidden_state[:, 0]
        )
        return torch.nn.functional.normalize(pooled.float(), dim=-1)


def _pictures(folder: Path) -> list[Image.Image]:
    if not folder.is_dir():
        raise HdlError(
            f"validation.style_references {folder}: no such folder; expected one of pictures in the look"
        )
    pictures = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        try:
            pictures.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise HdlError(f"validation.style_references: {path} is not readable ({error})") from None
    if not pictures:
        raise HdlError(
            f"validation.style_references {folder}: no picture there; expected {', '.join(sorted(PICTURES))}"
        )
    return pictures


def _function(named: str) -> Score:
    module, _, name = named.partition(":")
    if not name:
        raise HdlError(
            f"validation.style {named!r}: neither the folder of an image encoder nor a function as package.module:function"
        )
    sys.path.insert(0, "")  # a module beside the config, as `python -m` would find it
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever it does when it is imported
        raise HdlError(f"validation.style {named!r} cannot be imported ({error!r})") from None
    finally:
        sys.path.remove("")
    if not callable(function):
        raise HdlError(
            f"validation.style {named!r} is no function; expected one of a PIL image that returns a number"
        )

    def score(picture: Image.Image) -> float:
        try:
            found = function(picture)
        except Exception as error:  # anything may be wrong with it
            raise HdlError(f"validation.style {named!r} failed ({error!r})") from error
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise HdlError(f"validation.style {named!r} returned {found!r}; expected a finite number")
        return value

    return score
