import pytest
import torch

from hdl.o1.patches import patchify, to_model, to_pixels, unpatchify


def test_patch_order_is_channel_row_column() -> None:
    image = torch.arange(64 * 96 * 3).reshape(64, 96, 3)
    patches = patchify(image)
    assert patches.shape == (6, 3072)
    row, col, channel, y, x = 1, 2, 1, 5, 7
    assert patches[row * 3 + col, channel * 1024 + y * 32 + x] == image[row * 32 + y, col * 32 + x, channel]


def test_unpatchify_is_the_inverse() -> None:
    image = torch.randint(0, 256, (96, 160, 3), dtype=torch.uint8)
    assert torch.equal(unpatchify(patchify(image), 3, 5), image)


def test_every_uint8_survives_the_model_range() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model(pixels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_pixels(x), pixels)


@pytest.mark.parametrize("shape", [(100, 64, 3), (64, 64, 4), (0, 64, 3)])
def test_a_size_that_is_no_multiple_of_a_patch_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        patchify(torch.zeros(shape))
