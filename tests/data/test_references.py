"""Reference images become the very patches that the model's own code makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from hdl.data.images import Skip
from hdl.data.pictures import patches_of
from hdl.data.references import largest_side, reference_size, resize_reference
from tests.data.image_folders import noise


@pytest.mark.parametrize("name", ["edit1", "edit2"])
def test_patches_are_the_models_own(golden: Path, name: str) -> None:
    cases = json.loads((golden / "index.json").read_text())["cases"]
    case = next(case for case in cases if case["file"] == f"{name}.safetensors")
    images = [Image.open(golden / file) for file in case["refs"]]
    side = largest_side(len(images), case["width"], case["height"])
    patches = np.concatenate([patches_of(resize_reference(image, side)) for image in images])
    target = case["width"] * case["height"] // 32**2
    expected = load_file(golden / case["file"])["z_init"][target:]
    assert np.array_equal(patches, np.round((expected + 1) * 127.5).astype(np.uint8))
    assert np.abs(patches / np.float32(127.5) - 1 - expected).max() < 1e-6


def test_the_more_references_the_smaller() -> None:
    sides = [largest_side(count, 1536, 1024) for count in (1, 2, 3, 4, 5, 8, 9)]
    assert sides == [1536, 1152, 768, 768, 576, 576, 384]


def test_size_is_the_largest_that_fits() -> None:
    assert reference_size(1000, 1000, 1024) == (1024, 1024)
    assert reference_size(2000, 1000, 1024) == (1440, 704)
    assert reference_size(999, 1001, 64) == (64, 64)  # rounded up in both would be 64, too: 63.9, 64.03


def test_large_references_are_halved_first() -> None:
    large = noise(640, 640)
    small = large.resize((320, 320), Image.Resampling.BOX).resize((160, 160), Image.Resampling.BOX)
    assert np.array_equal(np.asarray(resize_reference(large, 96)), np.asarray(resize_reference(small, 96)))


def test_reference_without_a_size_that_fits() -> None:
    with pytest.raises(Skip, match="one of its sides is shorter than a patch"):
        resize_reference(noise(640, 64), 64)
