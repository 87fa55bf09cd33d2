"""Whatever an image file holds, the right RGB comes out, or a skip that says why."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageCms

from hdl.data.buckets import Shrunk, fit
from hdl.data.images import (
    Skip,
    decoding,
    open_image,
    read_bytes,
    read_rgb,
    shrink_on_decoding,
    upright_rgb,
    upright_size,
)

SIDE = 40


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(read_rgb(data)[0])


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (flat("RGB", (200, 100, 50)), (200, 100, 50)),
        (flat("L", 90), (90, 90, 90)),
        (flat("1", 1), (255, 255, 255)),
        (flat("RGBA", (200, 100, 50, 0)), (255, 255, 255)),
        (flat("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
        (flat("RGBA", (0, 0, 0, 51)), (204, 204, 204)),
        (flat("LA", (100, 0)), (255, 255, 255)),
        (flat("LA", (0, 51)), (204, 204, 204)),
        (flat("I;16", 0x8080), (128, 128, 128)),
        (flat("I;16", 65535), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_png_modes(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert (rgb(encoded(image)) == expected).all()


def png(bit_depth: int, colour_type: int, row: bytes, extra: bytes = b"") -> bytes:
    """A PNG of SIDE x SIDE whose rows are all `row`, for kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, bit_depth, colour_type, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * SIDE)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_16_bit_colour_png() -> None:
    row = struct.pack(">HHH", 0xC8C8, 0x6464, 0x3232) * SIDE
    assert (rgb(png(16, 2, row)) == (0xC8, 0x64, 0x32)).all()


def test_16_bit_colour_png_with_alpha() -> None:
    row = struct.pack(">HHHH", 0xC8C8, 0x6464, 0x3232, 0) * SIDE
    assert (rgb(png(16, 6, row)) == 255).all()


def test_16_bit_grey_pgm() -> None:
    pixels = struct.pack(">H", 0x4040) * (SIDE * SIDE)
    assert (rgb(b"P5 %d %d 65535\n" % (SIDE, SIDE) + pixels) == 0x40).all()


def test_palette() -> None:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert (rgb(encoded(image)) == (10, 200, 30)).all()


def test_transparent_palette_entry_becomes_white() -> None:
    image = flat("P", 0)
    image.putpalette([10, 200, 30, 1, 2, 3])
    image.paste(1, (0, 0, SIDE, 20))
    out = rgb(encoded(image, transparency=0))
    assert (out[:20] == (1, 2, 3)).all()
    assert (out[20:] == 255).all()


def test_transparent_gif() -> None:
    image = flat("P", 0)
    image.putpalette([10, 200, 30, 1, 2, 3])
    image.paste(1, (0, 0, SIDE, 20))
    out = rgb(encoded(image, "GIF", transparency=0))
    assert (out[:20] == (1, 2, 3)).all()
    assert (out[20:] == 255).all()


def test_transparent_colour_of_rgb_png() -> None:
    assert (rgb(encoded(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == 255).all()


def test_cmyk_jpeg() -> None:
    out = rgb(encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(out.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation_turns_the_image_upright(format: str) -> None:
    image = Image.new("RGB", (80, SIDE), "black")
    image.paste((255, 255, 255), (0, 0, 40, SIDE))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise: left becomes top
    data = encoded(image, format, exif=exif)
    assert upright_size(open_image(data)) == (
        SIDE,
        80,
    )  # of the header alone: Pillow turns a TIFF's by itself
    out = rgb(data)
    assert out.shape == (80, SIDE, 3)
    assert (out[:40] == 255).all() and (out[40:] == 0).all()


def test_colour_profile_is_applied() -> None:
    # sRGB with the red and blue primaries exchanged, under another name.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    out = rgb(encoded(flat("RGB", (255, 0, 0)), icc_profile=swapped))
    assert np.abs(out.astype(int) - (0, 0, 255)).max() <= 2


@pytest.mark.parametrize("kind", ["damaged", "sRGB"])
def test_damaged_or_srgb_profile_leaves_pixels_alone(kind: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = {"damaged": b"not a profile", "sRGB": srgb}[kind]
    assert (rgb(encoded(flat("RGB", (201, 99, 51)), icc_profile=profile)) == (201, 99, 51)).all()


def test_first_frame_of_an_animation_with_a_note() -> None:
    frames = [flat("RGB", "red"), flat("RGB", "blue")]
    image, note = read_rgb(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (np.asarray(image) == (255, 0, 0)).all()
    assert note == "the file has 2 frames; the first one is used"


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    data = bytearray(encoded(Image.new("1", (64, 64))))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (bomb(30000), "decompression bomb", "more than 89,478,485 pixels"),
        (bomb(10000), "decompression bomb", "more than 89,478,485 pixels"),
        (encoded(Image.new("RGB", (31, 500))), "too small", "31x500 px, smaller than one patch"),
        (encoded(Image.effect_noise((64, 64), 50))[:-900], "corrupt image", "corrupt or cut off"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "corrupt image", "corrupt or cut off"),
        (b"these are no pixels", "corrupt image", "damaged from its start"),
        (encoded(flat("RGB", 0), "EPS"), "corrupt image", "not of a format that hdl reads"),
        (bomb(64).replace(b"IHDR", b"IHDX"), "corrupt image", "damaged from its start"),
        (encoded(flat("F", 0.5), "TIFF"), "no white level", "32-bit pixels (mode F) from 0.5 to 0.5"),
        (encoded(flat("I", 70000), "TIFF"), "no white level", "from 70000 to 70000"),
    ],
    ids=["bomb", "large", "small", "cut PNG", "cut JPEG", "text", "EPS", "bad header", "float", "32-bit"],
)
def test_bad_images_are_skipped_with_a_reason(data: bytes, kind: str, reason: str) -> None:
    with pytest.raises(Skip) as skip:
        read_rgb(data)
    assert skip.value.kind == kind
    assert reason in skip.value.reason


def photograph() -> Image.Image:
    return Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")


def decoded_for(data: bytes, scale: float) -> tuple[Image.Image, Shrunk]:
    with decoding():
        image = open_image(data)
        shrunk = shrink_on_decoding(image, scale)
        return upright_rgb(image), shrunk


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "divisor"), [(352, 1), (128, 2), (96, 2), (64, 4), (32, 4)])
def test_large_jpegs_are_decoded_no_larger_than_needed(width: int, divisor: int, orientation: int) -> None:
    """And look as if they were decoded in full: a mean error of 1.5 of 255 at most; below, not a bit differs."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph().crop((0, 0, 498, 411))  # sides that no divisor divides
    data = encoded(image, "JPEG", quality=92, subsampling=orientation % 2 * 2, exif=exif)
    whole = read_rgb(data)[0]
    window = (3, 1, whole.width - 2, whole.height - 4)
    part = whole.crop(window)
    small, shrunk = decoded_for(data, width / min(part.size))
    assert shrunk.divisor == divisor
    assert small.size == tuple(-(-side // divisor) for side in whole.size)
    found = np.asarray(fit(small, width // 32, width // 32, window, shrunk), int)
    if divisor == 1:
        assert np.array_equal(found, np.asarray(fit(whole, width // 32, width // 32, window), int))
    exact = part.resize((width, width), Image.Resampling.LANCZOS, box=centre_square(part))
    assert np.abs(found - np.asarray(exact, int)).mean() <= 1.5


def centre_square(image: Image.Image) -> tuple[float, float, float, float]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def test_other_formats_are_decoded_in_full() -> None:
    assert decoded_for(encoded(photograph()), 0.01)[1].divisor == 1


def test_cut_off_jpeg_is_skipped_also_when_decoded_small() -> None:
    with pytest.raises(Skip, match="corrupt or cut off"):
        decoded_for(encoded(photograph(), "JPEG")[:-9000], 0.05)


def test_jpeg_named_png(tmp_path: Path) -> None:
    photograph().save(tmp_path / "a.png", "JPEG")
    assert read_rgb(read_bytes(str(tmp_path / "a.png")))[0].size == (512, 512)


def test_zero_bytes_and_unreadable_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**30 + 1)
    for path, kind in (
        (empty, "empty file"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe.png", "not a file"),
        (Path("/dev/zero"), "not a file"),
        (tmp_path / "huge.png", "file too large"),
        (tmp_path / "no", "unreadable file"),
    ):
        with pytest.raises(Skip) as skip:
            read_bytes(str(path))
        assert skip.value.kind == kind
