"""What a model is asked about an image, and what it says; the two backends share these."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from hdl.data.captions import Look
from hdl.data.images import Skip, read_bytes, read_rgb


@dataclass(frozen=True)
class Question:
    """One caption that is wanted. file: the caption's path, relative to the images folder, as is `source`."""

    path: Path
    source: str
    file: str
    look: Look
    prompt: str
    seed: int
    image_sha256: str
    recipe: str


@dataclass(frozen=True)
class Answer:
    """The model's words as they came. cut: it was stopped at max_new_tokens."""

    text: str
    cut: bool


class Backend(Protocol):
    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer | Skip]]:
        """Every question once, in any order, with its answer or why its image has none."""
        ...


_decoding = threading.Lock()  # read_rgb sets what warnings do, which is the same for all threads


def picture(path: Path, max_side: int) -> Image.Image:
    """The image in upright sRGB, shrunk to fit a square of `max_side` px. Raises Skip."""
    data = read_bytes(str(path))
    with _decoding:
        image, _ = read_rgb(data)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return image
