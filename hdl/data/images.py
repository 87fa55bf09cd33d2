"""From a file's bytes to right RGB.

Whatever the file holds (rotated by EXIF, transparent, indexed, grey, CMYK, 16-bit, with a colour profile)
comes out as the 8-bit sRGB picture a viewer would show on a white page. Whatever cannot be shown is a
`Skip` with a reason that a person can act on; no file ever stops a run. Only Pillow and numpy are
imported here, so that worker processes start fast.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps

from hdl.data.buckets import PATCH, choose_bucket, fit

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# By content, not by name: Pillow knows formats that run other programs (EPS) or are no pictures.
Image.init()
FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}.intersection(Image.OPEN))


class Skip(Exception):
    """A file that cannot be used. `kind` groups skips in counts, `reason` is the whole sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """An image at its bucket's size: uint8 [rows*32, cols*32, 3]."""

    pixels: np.ndarray
    rows: int
    cols: int
    note: str | None


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know about one file."""

    path: str
    area: int
    allow_upscaling: bool
    unchanged_if: str | None  # the file's sha256 at which the picture need not be made again


def picture_or_skip(job: Job) -> tuple[str, Picture | None] | Skip:
    """`make_picture` for another process: a Skip is returned, not raised."""
    try:
        return make_picture(job)
    except Skip as skip:
        return skip


def make_picture(job: Job) -> tuple[str, Picture | None]:
    """(sha256 of the file, its picture, or None where the file is the one known before). Raises Skip."""
    data = read_bytes(job.path)
    digest = hashlib.sha256(data).hexdigest()
    if digest == job.unchanged_if:
        return digest, None
    image, note = read_rgb(data)
    rows, cols = choose_bucket(image.width, image.height, job.area, job.allow_upscaling)
    return digest, Picture(np.asarray(fit(image, rows, cols)), rows, cols, note)


def read_bytes(path: str) -> bytes:
    """The file's bytes; Skip where it cannot be read or is empty."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise Skip("unreadable file", f"the file cannot be read ({error.strerror})") from None
    if not data:
        raise Skip("empty file", "the file has zero bytes")
    return data


def read_rgb(data: bytes) -> tuple[Image.Image, str | None]:
    """An image file's bytes -> (upright 8-bit sRGB image, a note for the report or None). Raises Skip."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which are not needed
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
            check_size(image)
            note = first_frame_note(image)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image)), note
    except Skip:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip(
            "decompression bomb",
            f"the image claims more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels, the limit that keeps a "
            "decompression bomb from filling the memory; scale it down first",
        ) from None
    except Image.UnidentifiedImageError:
        raise Skip(
            "corrupt image", "the content is damaged from its start, or not of a format that hdl reads"
        ) from None
    except (
        Exception
    ) as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error…
        raise Skip(
            "corrupt image", f"the image is corrupt or cut off ({error or type(error).__name__})"
        ) from None


def check_size(image: Image.Image) -> None:
    """Skip an image smaller than one patch, before it is decoded."""
    if min(image.size) < PATCH:
        raise Skip(
            "too small",
            f"the image is {image.width}x{image.height} px, smaller than one patch of {PATCH}x{PATCH} px",
        )


def first_frame_note(image: Image.Image) -> str | None:
    """Says that only the first frame is used. Phones' MPO files hold one photo and its previews: no note."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        return f"the file has {frames} frames; the first one is used"
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: 16 bits to 8, transparency over white, colours to sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = grey_to_8_bit(image)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.new("RGBA", picture.size, "white")
        image.alpha_composite(picture)
        image = image.convert("RGB")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    if profile:
        image = to_srgb(image, profile)
    return image.convert("RGB")


def grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, 0..65535, -> L. (16-bit colour Pillow brings to 8 bits itself.)"""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise Skip(
            "no white level",
            f"the image has 32-bit pixels (mode {image.mode}) from {grey.min():g} to {grey.max():g}, with no "
            "defined white; save it with 8 or 16 bits",
        )
    return Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours by the embedded ICC profile -> sRGB; kept where that is sRGB, damaged, or of another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image
