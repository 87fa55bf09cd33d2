"""All that is made of one image's pixels: its views and its references, in patches. Runs in worker processes.

An image is read once and decoded once for all its views, at the scale that the largest of them needs. What
an earlier run made of the same bytes is only named, not made again. Patches are cut here, in numpy, so that
the workers need no torch and the one process that writes has little left to do.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from hdl.data.buckets import PATCH, Shrunk, fit
from hdl.data.images import (
    Skip,
    decoding,
    first_frame_note,
    open_image,
    read_bytes,
    read_rgb,
    shrink_on_decoding,
    upright_rgb,
    upright_size,
)
from hdl.data.references import largest_side, resize_reference
from hdl.data.views import Sizes, View, views_of

# What a worker is given at once (hdl/data/workers.py): files that are quickly read, and answers for which there
# is memory.
BUNDLE, BUNDLE_BYTES, BUNDLE_ANSWER_BYTES = 64, 256 * 1024, 16 * 2**20


@dataclass(frozen=True)
class Job:
    """What a worker needs to know about one image.

    references: paths of the pictures it was made from. known: view -> the hash (`Pictures.sha256`) at which an
    earlier run's sample of it is still right.
    """

    path: str
    sizes: Sizes
    references: tuple[str, ...] = ()
    known: dict[str | None, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One view: patches uint8 [rows*cols, 3072], references with their grids (rows, cols) likewise."""

    view: str | None
    rows: int
    cols: int
    patches: np.ndarray
    references: list[tuple[tuple[int, int], np.ndarray]]

    @property
    def bytes(self) -> int:
        return self.patches.nbytes + sum(patches.nbytes for _, patches in self.references)


@dataclass(frozen=True)
class Pictures:
    """sha256: of the image file; of a pair, of its files' hashes. views: in order, each a picture, or the name
    alone where the earlier run's sample is still right."""

    sha256: str
    views: list[Picture | str | None]
    note: str | None = None


def pictures_or_skip(job: Job) -> Pictures | Skip:
    """`make_pictures` for another process: a Skip is returned, not raised."""
    try:
        return make_pictures(job)
    except Skip as skip:
        return skip


def job_weight(job: Job) -> float:
    """The part of a bundle that a job makes: how much it has to read."""
    try:
        return max(1 / BUNDLE, os.stat(job.path).st_size / BUNDLE_BYTES)
    except OSError:  # the worker will say so
        return 1 / BUNDLE


def answer_weight(answer: Pictures | Skip) -> float:
    """The part of what a bundle may give that an answer makes: how much memory it takes."""
    views = answer.views if isinstance(answer, Pictures) else []
    return sum(view.bytes for view in views if isinstance(view, Picture)) / BUNDLE_ANSWER_BYTES


def make_pictures(job: Job) -> Pictures:
    """All views of an image. Skip where it or one of its references cannot be used."""
    data = read_bytes(job.path)
    digest = hashlib.sha256(data).hexdigest()
    sources = [_read_reference(path) for path in job.references]
    if sources:
        digests = [digest, *(hashlib.sha256(source).hexdigest() for source in sources)]
        digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    names = job.sizes.names()
    if all(job.known.get(name) == digest for name in names):
        return Pictures(digest, [*names])  # without even reading the header
    with decoding():
        image = open_image(data)
        views = views_of(*upright_size(image), digest, job.sizes)
        if all(job.known.get(view.name) == digest for view in views):
            return Pictures(digest, [view.name for view in views])
        note = first_frame_note(image)
        shrunk = shrink_on_decoding(image, max(view.scale for view in views))
        upright = upright_rgb(image)
    references = [_reference_rgb(path, source) for path, source in zip(job.references, sources)]
    made: list[Picture | str | None] = []
    for view in views:
        if job.known.get(view.name) == digest:
            made.append(view.name)
        else:
            made.append(_picture(view, upright, shrunk, references, job.references))
    return Pictures(digest, made, note)


def patches_of(image: Image.Image) -> np.ndarray:
    """uint8 [N, 3072], as hdl.o1.patches.patchify cuts them."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    squares = pixels.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return np.ascontiguousarray(squares.transpose(0, 2, 4, 1, 3)).reshape(-1, 3 * PATCH * PATCH)


def _picture(
    view: View, upright: Image.Image, shrunk: Shrunk, references: list[Image.Image], paths: tuple[str, ...]
) -> Picture:
    side = largest_side(len(references), view.cols * PATCH, view.rows * PATCH) if references else 0
    small = []
    for path, reference in zip(paths, references):
        with _of_reference(path):
            resized = resize_reference(reference, side)
        small.append(((resized.height // PATCH, resized.width // PATCH), patches_of(resized)))
    pixels = fit(upright, view.rows, view.cols, view.window, shrunk)
    return Picture(view.name, view.rows, view.cols, patches_of(pixels), small)


@contextmanager
def _of_reference(path: str) -> Iterator[None]:
    """A bad reference is a skip of its target."""
    try:
        yield
    except Skip as skip:
        raise Skip("bad reference", f"its reference {os.path.basename(path)}: {skip.reason}") from None


def _read_reference(path: str) -> bytes:
    with _of_reference(path):
        return read_bytes(path)


def _reference_rgb(path: str, data: bytes) -> Image.Image:
    with _of_reference(path):
        return read_rgb(data)[0]
