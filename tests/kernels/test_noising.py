"""Noise that belongs to a sample, and the kernel that mixes it in without ever writing it down.

Without a GPU the kernel runs in Triton's interpreter, at some 0.1 s a patch: packs are small here.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from hdl.flow.noise import add_noise, clip_noise
from hdl.kernels import noising
from hdl.kernels.noising import draw_noise, noise_patches, philox
from hdl.o1.patches import PATCH_DIM, to_model
from tests.kernels.helpers import DEVICE

KEYS = [3, 2**62 + 12345, 2**32, 77, 2**63 - 1]


def plain(pixels: Tensor, sigma: Tensor, eps: Tensor, counts: list[int], scale: float, clip: float | None):  # type: ignore[no-untyped-def]
    """The formula in float64, from noise that is given."""
    eps = torch.cat([clip_noise(of_sample, clip) for of_sample in eps.double().split(counts)])
    x0 = pixels.cpu().double() / 127.5 - 1.0
    return add_noise(x0, eps, sigma.cpu().double().repeat_interleave(torch.tensor(counts)), scale)


def some_pixels(patches: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (patches, PATCH_DIM), generator=generator, dtype=torch.uint8)
    return pixels.to(DEVICE)


def some_sigma(samples: int) -> Tensor:
    return torch.linspace(0.05, 0.95, samples, device=DEVICE)


@pytest.fixture(params=["kernel", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the kernel and on the plain formula."""
    if request.param == "plain":
        monkeypatch.setattr(noising, "runs_triton", lambda tensor: False)
    return request.param


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_numbers(counter: str, key: str, words: str) -> None:
    """The known answers published with Random123 for philox4x32 in 10 rounds."""
    x = np.array([int(word, 16) for word in counter.split()], dtype=np.uint64)[:, None]
    low, high = (int(word, 16) for word in key.split())
    even, odd = x[0::2].copy(), x[1::2].copy()
    philox(even, odd, np.array([low + (high << 32)], dtype=np.uint64))
    assert " ".join(f"{int(w):08x}" for w in (even[0, 0], odd[0, 0], even[1, 0], odd[1, 0])) == words


def test_noise_is_standard_normal() -> None:
    eps = draw_noise([100, 200], [11, 12]).double()
    n = eps.numel()
    assert abs(float(eps.mean())) < 4 / n**0.5
    assert abs(float(eps.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(eps.pow(3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float(eps.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5
    expected = torch.special.ndtri(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    drawn = torch.from_numpy(np.quantile(eps.numpy(), np.linspace(0.001, 0.999, 999)))
    assert float((drawn - expected).abs().max()) < 0.03
    assert 4.3 < float(eps.abs().max()) < 6.8
    # Every column on its own too: the four runs of columns come from different words.
    assert float((eps.mean(0) * 300**0.5).abs().max()) < 5
    assert float(((eps.var(0) - 1) * (300 / 2) ** 0.5).abs().max()) < 7


def test_noise_is_unlike_any_other_noise() -> None:
    """Of another sample, another patch, another column, and of both halves of a key."""

    def correlation(a: Tensor, b: Tensor) -> float:  # in its own standard deviations
        return abs(float((a * b).mean())) * a.numel() ** 0.5

    samples = draw_noise([64] * 4, [5, 6, 5 + 2**32, 5 + 2**33]).split(64)
    for i, one in enumerate(samples):
        for other in samples[:i]:
            assert correlation(one, other) < 4.5
            assert correlation(one[1:], other[:-1]) < 4.5
        assert correlation(one[1:], one[:-1]) < 4.5
        for shift in (1, 2, 3, 4, 767, 768, 1536, 2304):
            assert correlation(one[:, shift:], one[:, :-shift]) < 4.5
            assert correlation(one[:, shift:].square() - 1, one[:, :-shift].square() - 1) / 2 < 4.5
    everything = torch.cat(samples).flatten()
    assert len(everything.unique()) > 0.9 * len(everything)  # float32 has only so many numbers


def test_noise_reaches_the_last_patch_of_the_largest_image() -> None:
    """Counters do not run into one another: 16,384 patches, none like another."""
    eps = draw_noise([16384], [9])
    assert len(eps[:, ::768].unique(dim=0)) == 16384
    assert abs(float(eps[-1].double().std()) - 1) < 0.06
    assert torch.equal(eps[:5], draw_noise([5], [9]))


@pytest.mark.parametrize("counts", [[1], [3, 1, 2], [1, 1, 1, 1, 2]])
@pytest.mark.parametrize("clip", [None, 2.5])
def test_patches_are_noised_as_the_formula_says(path: str, counts: list[int], clip: float | None) -> None:
    keys, patches = KEYS[: len(counts)], sum(counts)
    pixels, sigma = some_pixels(patches), some_sigma(len(counts))
    z = noise_patches(pixels, sigma, counts, keys, noise_scale=7.5, clip=clip, dtype=torch.float32)
    expected = plain(pixels, sigma, draw_noise(counts, keys), counts, 7.5, clip)
    assert z.dtype == torch.float32 and z.device.type == DEVICE.type
    for of_sample, true in zip(z.cpu().double().split(counts), expected.split(counts)):
        assert float((of_sample - true).norm() / true.norm()) < 1e-6
        assert float((of_sample - true).abs().max() / true.abs().max()) < 1e-5


def test_a_sample_is_noised_alike_packed_or_apart(path: str) -> None:
    counts, pixels, sigma = [2, 1, 3], some_pixels(6), some_sigma(3)

    def noised(pixels: Tensor, sigma: Tensor, counts: list[int], keys: list[int]) -> Tensor:
        return noise_patches(pixels, sigma, counts, keys, noise_scale=7.5, clip=2.5, dtype=torch.float32)

    together = noised(pixels, sigma, counts, KEYS[:3])
    parts = zip(pixels.split(counts), sigma.split(1), counts, KEYS)
    apart = [noised(part, level, [count], [key]) for part, level, count, key in parts]
    assert torch.equal(together, torch.cat(apart))


def test_black_and_white_without_noise_are_minus_one_and_one(path: str) -> None:
    pixels = torch.tensor([0, 255, 127, 128], dtype=torch.uint8, device=DEVICE).repeat(2, PATCH_DIM // 4)
    sigma = torch.tensor([0.0], device=DEVICE)
    z = noise_patches(pixels, sigma, [2], [1], noise_scale=8.0, clip=None, dtype=torch.float32)
    expected = torch.tensor([-1.0, 1.0, -0.5 / 127.5, 0.5 / 127.5], device=DEVICE).repeat(2, PATCH_DIM // 4)
    assert float((z - expected).abs().max()) < 1.2e-7


def test_noise_alone_is_the_noise_drawn(path: str) -> None:
    pixels, sigma = some_pixels(3), torch.tensor([1.0], device=DEVICE)
    z = noise_patches(pixels, sigma, [3], [KEYS[1]], noise_scale=1.0, clip=None, dtype=torch.float32)
    eps = draw_noise([3], [KEYS[1]])
    # Near zero a radius is the root of a difference: absolute, not relative, exactness is what there is.
    assert float((z.cpu() - eps).abs().max()) < 2e-6


def test_a_model_in_bfloat16_gets_the_same_noise_rounded_once(path: str) -> None:
    pixels, sigma = some_pixels(3), some_sigma(2)
    settings = {"noise_scale": 8.0, "clip": None}
    whole = noise_patches(pixels, sigma, [1, 2], KEYS[:2], dtype=torch.float32, **settings)  # type: ignore[arg-type]
    z = noise_patches(pixels, sigma, [1, 2], KEYS[:2], dtype=torch.bfloat16, **settings)  # type: ignore[arg-type]
    assert torch.equal(z, whole.bfloat16())


def test_dev_clips_each_sample_at_its_own_deviation(path: str) -> None:
    """Noise alone, scale 1: what is seen is the clipped noise itself."""
    counts, pixels, sigma = [2, 1], some_pixels(3), torch.ones(2, device=DEVICE)
    z = noise_patches(pixels, sigma, counts, KEYS[:2], noise_scale=1.0, clip=2.5, dtype=torch.float32).cpu()
    for seen, eps in zip(z.split(counts), draw_noise(counts, KEYS[:2]).split(counts)):
        bound = 2.5 * float(eps.double().std())
        assert float(seen.max()) == pytest.approx(bound, rel=1e-6)
        assert float(seen.min()) == pytest.approx(-bound, rel=1e-6)
        assert float((seen - clip_noise(eps, 2.5)).abs().max()) < 2e-6


def test_pixels_may_be_columns_of_something_wider(path: str) -> None:
    wide = some_pixels(6).view(3, -1)  # rows twice as long
    settings = {"noise_scale": 8.0, "clip": None, "dtype": torch.float32}
    sigma = some_sigma(1)
    for view in (wide[:, :PATCH_DIM], wide[:, 8 : PATCH_DIM + 8], wide[:, ::2]):
        z = noise_patches(view, sigma, [3], [4], **settings)  # type: ignore[arg-type]
        assert torch.equal(z, noise_patches(view.contiguous(), sigma, [3], [4], **settings))  # type: ignore[arg-type]


def test_what_does_not_fit_together_is_refused() -> None:
    pixels = some_pixels(3)
    for counts, keys, samples in [([2], [1], 1), ([1, 2], [1], 2), ([1, 2], [1, 2], 1)]:
        with pytest.raises(ValueError, match="the same samples"):
            noise_patches(
                pixels, some_sigma(samples), counts, keys, noise_scale=8.0, clip=None, dtype=torch.float32
            )


@pytest.mark.skipif(DEVICE.type == "cpu", reason="interpreting so many patches takes minutes")
@pytest.mark.parametrize("clip", [None, 2.5])
def test_a_gpu_draws_whole_images(clip: float | None) -> None:
    counts = [1024, 16384, 1, 999]
    pixels, sigma = some_pixels(sum(counts)), some_sigma(4)
    settings = {"noise_scale": 7.5, "clip": clip, "dtype": torch.float32}
    z = noise_patches(pixels, sigma, counts, KEYS[:4], **settings)  # type: ignore[arg-type]
    eps = torch.cat([clip_noise(e, clip) for e in draw_noise(counts, KEYS[:4]).split(counts)])
    levels = sigma.cpu().repeat_interleave(torch.tensor(counts))
    expected = add_noise(to_model(pixels.cpu()), eps, levels, 7.5)
    assert float((z.cpu() - expected).abs().max()) < 1e-5 * 7.5 * 6
    assert torch.equal(z, noise_patches(pixels, sigma, counts, KEYS[:4], **settings))  # type: ignore[arg-type]
