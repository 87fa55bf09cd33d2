"""Buckets keep shapes, stay within the area, never enlarge; fitting never distorts."""

import math
import random

import numpy as np
import pytest
from PIL import Image

from hdl.data import buckets
from hdl.data.buckets import choose_bucket, fit
from hdl.o1 import patches
from tests.data.image_folders import noise

RANDOM = random.Random(0)
SIZES = [(RANDOM.randint(32, 5000), RANDOM.randint(32, 5000)) for _ in range(200)]
PHOTOS = [(w, h) for w, h in SIZES if 1 / 3 <= w / h <= 3 and min(w, h) >= 1024]


def test_patch_is_the_models() -> None:
    assert buckets.PATCH == patches.PATCH


@pytest.mark.parametrize("area", [128, 512, 1024])
def test_never_more_than_the_area_nor_than_the_image(area: int) -> None:
    for width, height in SIZES:
        rows, cols = choose_bucket(width, height, area, allow_upscaling=False)
        assert rows >= 1 and cols >= 1
        assert rows * cols * 32 * 32 <= area * area
        assert cols * 32 <= width and rows * 32 <= height


def test_photographs_fill_the_area_and_lose_little_to_the_crop() -> None:
    assert len(PHOTOS) > 50
    for width, height in PHOTOS:
        rows, cols = choose_bucket(width, height, 1024, allow_upscaling=False)
        assert rows * cols >= 0.9 * 32 * 32
        assert abs(math.log(cols / rows * height / width)) <= 0.05


def test_small_images_keep_their_shape_and_most_of_their_pixels() -> None:
    assert choose_bucket(128, 96, 1024, allow_upscaling=False) == (3, 4)
    assert choose_bucket(100, 100, 1024, allow_upscaling=False) == (3, 3)
    assert choose_bucket(32, 32, 1024, allow_upscaling=False) == (1, 1)


def test_upscaling_on_demand() -> None:
    assert choose_bucket(128, 96, 1024, allow_upscaling=False) == (3, 4)
    rows, cols = choose_bucket(128, 96, 1024, allow_upscaling=True)
    assert rows * cols >= 0.9 * 32 * 32
    assert abs(cols / rows - 4 / 3) < 0.07


def test_common_shapes() -> None:
    assert choose_bucket(4000, 4000, 1024, allow_upscaling=False) == (32, 32)
    assert choose_bucket(6000, 4000, 1024, allow_upscaling=False) == (26, 39)
    assert choose_bucket(4000, 6000, 1024, allow_upscaling=False) == (39, 26)


def test_fit_keeps_the_pixels_of_an_image_of_its_buckets_size() -> None:
    image = noise(96, 64)
    assert np.array_equal(np.asarray(fit(image, 2, 3)), np.asarray(image))


def test_fit_crops_the_middle_without_touching_pixels_where_nothing_is_scaled() -> None:
    image = noise(105, 64)
    assert np.array_equal(np.asarray(fit(image, 2, 3)), np.asarray(image)[:, 4:100])


@pytest.mark.parametrize("size", [(1000, 700), (333, 1000), (640, 427)])
def test_fit_never_distorts(size: tuple[int, int]) -> None:
    """A disc stays a disc: as high as it is wide."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(size) * 0.4) ** 2
    image = Image.fromarray(np.where(disc, 0, 255).astype(np.uint8)).convert("RGB")
    rows, cols = choose_bucket(width, height, 256, allow_upscaling=False)
    out = np.asarray(fit(image, rows, cols))[..., 0] < 128
    assert out.shape == (rows * 32, cols * 32)
    assert abs(int(out.any(0).sum()) - int(out.any(1).sum())) <= 1


def test_fit_takes_a_bucket_of_exactly_the_images_shape() -> None:
    """27 x 36 patches have the shape of 4000 x 3000 px: rounding once put the crop outside the image."""
    assert fit(Image.new("RGB", (4000, 3000)), 27, 36).size == (1152, 864)


def test_fit_of_a_window_is_fit_of_what_it_shows() -> None:
    image = noise(200, 150)
    window = (17, 30, 150, 140)
    found, expected = np.asarray(fit(image, 2, 3, window)), np.asarray(fit(image.crop(window), 2, 3))
    within = slice(4, -4)  # Lanczos looks across the window's edge
    assert np.abs(found[within, within].astype(int) - expected[within, within]).max() <= 1
