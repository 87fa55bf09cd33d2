"""From a file's bytes to right RGB.

Whatever the file holds (rotated by EXIF, transparent, indexed, grey, CMYK, 16-bit, with a colour profile)
comes out as the 8-bit sRGB picture a viewer would show on a white page. Whatever cannot be shown is a
`Skip` with a reason that a person can act on; no file ever stops a run. Only Pillow and numpy are
imported here, so that worker processes start fast.

A large JPEG need not be decoded in full: libjpeg gives a half or a quarter of it for less work. That is as good
as the full decode where Lanczos still has something to do afterwards; how much is `DECODED_GAP`.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from hdl.data.buckets import FULL, PATCH, Shrunk

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What is decoded has at least this many times the pixels needed, a side. Photographs then differ from those
# made of a full decode by a mean of at most 1.2/255; with 1.0 it is up to 2.8.
DECODED_GAP = 1.5
MAX_FILE_BYTES = 2**30  # the largest image allowed, uncompressed with 16 bits and alpha, has 0.7 of that
# By content, not by name: Pillow knows formats that run other programs (EPS) or are no pictures.
Image.init()
FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}.intersection(Image.OPEN))


class Skip(Exception):
    """A file that cannot be used. `kind` groups skips in counts, `reason` is the whole sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


def read_bytes(path: str) -> bytes:
    """The file's bytes; Skip where it cannot be read, is empty, or is no file: a pipe would never end."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK
        )  # opening a pipe would wait for who writes to it
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Skip("not a file", "a folder, pipe, socket or device, not a file")
            if status.st_size > MAX_FILE_BYTES:
                raise Skip(
                    "file too large",
                    f"the file has {status.st_size:,} bytes, more than an image of the allowed size can have "
                    f"({MAX_FILE_BYTES:,})",
                )
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                data = file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Skip("unreadable file", f"the file cannot be read ({error.strerror})") from None
    if not data:
        raise Skip("empty file", "the file has zero bytes")
    return data


def read_rgb(data: bytes) -> tuple[Image.Image, str | None]:
    """An image file's bytes -> (upright 8-bit sRGB image, a note for the report or None). Raises Skip."""
    with decoding():
        image = open_image(data)
        note = first_frame_note(image)
        return upright_rgb(image), note


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever Pillow raises for a bad file -> Skip."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which are not needed
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
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


def open_image(data: bytes) -> Image.Image:
    """The image with only its header read; Skip where it is too small. Within `decoding`, as what follows."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(image)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once the image is turned as its EXIF says; it need not be decoded."""
    width, height = image.size
    if isinstance(image, TiffImageFile):
        # Pillow turns its size when it opens the file, or only when it decodes it: what is stored is in the tags.
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def shrink_on_decoding(image: Image.Image, scale: float) -> Shrunk:
    """Let a JPEG decode at 1/2 or 1/4 where that leaves enough for a picture of `scale` of its size.

    To be called before decoding. Other formats, and smaller images, are decoded in full. (1/8 is no faster than
    1/4, and nothing but averages.)
    """
    for divisor in (4, 2):
        if divisor * scale * DECODED_GAP <= 1:
            full, orientation = image.size, _orientation(image)
            image.draft(None, (full[0] // divisor, full[1] // divisor))
            # JPEGs only, and Pillow has its own reasons not to: believe what it did.
            if image.size != tuple(-(-side // divisor) for side in full):
                return FULL
            beyond = [-side % divisor for side in full]
            if orientation in (5, 6, 7, 8):
                beyond.reverse()
            left = beyond[0] if orientation in (2, 3, 6, 7) else 0
            top = beyond[1] if orientation in (3, 4, 7, 8) else 0
            return Shrunk(divisor, left, top)
    return FULL


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image: upright, 8-bit sRGB."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # a copy of 12 megapixels takes 10 ms
    return to_rgb(image)


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
    """Any Pillow mode -> RGB: 16 bits to 8, transparency over white, colours to sRGB. An image that is so already is
    returned itself."""
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
    return image if image.mode == "RGB" else image.convert("RGB")


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
