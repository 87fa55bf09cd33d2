"""From stored pixels to what the model sees: z = (1 - sigma) x0 + sigma s eps, with x0 = pixels / 127.5 - 1.

uint8 [P, 3072] in, z [P, 3072] out in the dtype asked for. The kernel draws eps where it is used, so that
neither x0 nor eps nor a float32 z ever stands in memory: it reads one byte and writes one number.

The noise is a pure function of a sample's 64-bit key and of the place inside the sample. Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) turns the counter (q, patch, 0, 0),
q = 0 .. 767, under that key into four words w0 .. w3, and Box-Muller turns these into four normals:

    n0, n1 = r(w0) (cos, sin)(a(w1))      r(w) = sqrt(-2 log((w + 1/2) / 2^32))
    n2, n3 = r(w2) (cos, sin)(a(w3))      a(w) = 2 pi w / 2^32

n_j stands in column 768 j + q, so neighbouring q's are neighbours in memory. Counters differ for every
patch and column of any image, and the numbers reach 6.8 standard deviations. The plain formula computes
the same words, so a CPU and a GPU, one pack or many, draw the same noise up to rounding.

Where the variant clips eps at so many of the sample's own standard deviations, two small kernels draw it
once more beforehand: sums of every patch, then, in a fixed order and in float64, of every sample.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.flow.noise import add_noise, clip_noise
from hdl.kernels.backend import runs_triton
from hdl.o1.patches import PATCH_DIM, to_model
from hdl.transfer import send

QUADS = PATCH_DIM // 4  # counters a patch
BLOCK = 256  # counters a program: one a thread, so that nothing changes hands between threads
Words = np.ndarray[Any, np.dtype[np.uint64]]  # 32-bit words, with room for their products


def noise_patches(
    pixels: Tensor,
    sigma: Tensor,
    counts: Sequence[int],
    keys: Sequence[int],
    *,
    noise_scale: float,
    clip: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The packed samples' noisy patches z [P, 3072] in `dtype`.

    pixels: uint8 [P, 3072], rows of any stride; sigma: float32 [B]; counts: patches of each of the B
    samples, summing to P; keys: a number in [0, 2^63) for each, which its noise depends on, and on
    nothing else. clip: eps is clipped at this many of its own standard deviations (None: never).
    ValueError when the numbers of patches or samples do not agree.
    """
    if sum(counts) != len(pixels) or not len(counts) == len(keys) == len(sigma):
        raise ValueError(
            f"{len(pixels)} patches, counts {list(counts)}, {len(keys)} keys and {len(sigma)} noise levels "
            "do not describe the same samples"
        )
    if runs_triton(pixels):
        return _noise_patches_fused(pixels, sigma, counts, keys, noise_scale, clip, dtype)
    eps = draw_noise(counts, keys)
    if clip is not None:
        eps = torch.cat([clip_noise(of_sample, clip) for of_sample in eps.split(list(counts))])
    sigma_of_patch = sigma.repeat_interleave(torch.tensor(counts, device=sigma.device))
    return add_noise(to_model(pixels), eps.to(pixels.device), sigma_of_patch, noise_scale).to(dtype)


def draw_noise(counts: Sequence[int], keys: Sequence[int]) -> Tensor:
    """float32 [sum(counts), 3072] on the CPU, standard normal: count x 3072 numbers for each key."""
    patch = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts])
    key = np.repeat(np.array(keys, dtype=np.uint64), counts)
    eps = torch.empty(len(patch), 2, 2, QUADS)  # by patch, pair of words, cos or sin, q
    at_once = 32  # patches: what is worked on stays in a CPU's cache
    words = np.empty((2, 2, min(at_once, len(patch)), QUADS), dtype=np.uint64)
    for start in range(0, len(patch), at_once):
        part = slice(start, start + at_once)
        even, odd = words[:, :, : len(patch[part])]
        even[0], even[1] = np.arange(QUADS, dtype=np.uint64), 0
        odd[0], odd[1] = patch[part, None], 0
        philox(even, odd, key[part, None])
        radius = torch.from_numpy(even.astype(np.float32)).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = torch.from_numpy(odd.astype(np.uint32).view(np.int32)) * (2 * math.pi * 2.0**-32)
        out = eps[part].transpose(0, 1)
        torch.mul(radius, angle.cos(), out=out[:, :, 0])
        torch.mul(radius, angle.sin_(), out=out[:, :, 1])
    return eps.view(-1, PATCH_DIM)


def philox(even: Words, odd: Words, key: Words) -> None:
    """Philox4x32-10 in place, in numpy, whose integers are unsigned and faster here than torch's.

    even [2, ...]: words x0 and x2 of the counters, odd [2, ...]: x1 and x3; key [...]: 64 bits, k0 the
    lower half. A round makes of them, with (high, low) for the halves of a product, high(M1 x2) ^ x1 ^ k0,
    low(M1 x2), high(M0 x0) ^ x3 ^ k1, low(M0 x0), and adds W0, W1 to k0, k1.
    """
    tail = (1,) * key.ndim
    multipliers = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64).reshape(2, *tail)
    weyl = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64).reshape(2, *tail)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    round_key = np.stack([key & low, key >> half])
    product = np.empty_like(odd)
    for _ in range(10):  # an even number: what is odd at the end lies in the array that came in
        np.multiply(even, multipliers, out=product)
        np.right_shift(product[::-1], half, out=even)
        even ^= odd
        even ^= round_key
        even &= low
        odd, product = product[::-1], odd[::-1]  # a product's upper half is cut off with the next even's
        round_key = (round_key + weyl) & low
    odd &= low


def _noise_patches_fused(
    pixels: Tensor,
    sigma: Tensor,
    counts: Sequence[int],
    keys: Sequence[int],
    noise_scale: float,
    clip: float | None,
    dtype: torch.dtype,
) -> Tensor:
    patches, samples, device = len(pixels), len(counts), pixels.device
    if pixels.stride(1) != 1:
        pixels = pixels.contiguous()
    # One small copy to the device; each program finds its sample there.
    starts = np.cumsum([0, *counts])[:-1].tolist()
    count, key, start = send(torch.tensor([list(counts), list(keys), starts]), device)
    noise_level = sigma.to(device, torch.float32).contiguous()
    z = torch.empty(patches, PATCH_DIM, dtype=dtype, device=device)
    bound = noise_level  # not read where nothing is clipped
    if clip is not None:
        bound = torch.empty(samples, dtype=torch.float32, device=device)
        sums = torch.empty(2, patches, dtype=torch.float32, device=device)
        _sums_of_patches[(patches,)](
            key, start, sums, samples, patches, triton.next_power_of_2(samples), QUADS, BLOCK, num_warps=8
        )
        _bounds_of_samples[(samples,)](sums, start, count, bound, patches, clip, PATCH_DIM, 1024, num_warps=4)
    _noise[(patches, QUADS // BLOCK)](
        pixels, key, start, noise_level, bound, z, samples,
        pixels.stride(0), noise_scale, triton.next_power_of_2(samples), QUADS, BLOCK, clip is not None, num_warps=8,
    )  # fmt: skip
    return z


@triton.jit
def _turn(word: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of 2 pi word / 2^32: the nearest quarter turn, and Taylor's series within an eighth of it."""
    quarter = (word + 0x20000000) >> 30
    rest = (word - (quarter << 30)).to(tl.int32, bitcast=True)
    a = rest.to(tl.float32) * 1.4629180792671596e-9  # 2 pi / 2^32
    a2 = a * a
    cos = 1.0 + a2 * (-1 / 2 + a2 * (1 / 24 + a2 * (-1 / 720 + a2 * (1 / 40320))))
    sin = a + a * a2 * (-1 / 6 + a2 * (1 / 120 + a2 * (-1 / 5040 + a2 * (1 / 362880))))
    odd = (quarter & 1) == 1
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -x, x), tl.where(quarter >= 2, -y, y)


@triton.jit
def _box_muller(first: tl.tensor, second: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    uniform = (first.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(uniform), 0.0))
    cos, sin = _turn(second)
    return radius * cos, radius * sin


@triton.jit
def _normals(
    key: tl.tensor, patch: tl.tensor, quad: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four standard normals for each element of `quad`; key is int64, patch the place inside the sample."""
    column = quad.to(tl.uint32)
    zero = column * 0
    w0, w1, w2, w3 = tl.philox(key, column, zero + patch.to(tl.uint32), zero, zero)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _mix_one(
    pixels: tl.tensor,
    z: tl.tensor,
    at: tl.tensor,
    eps: tl.tensor,
    sigma: tl.tensor,
    scale: tl.tensor,
    bound: tl.tensor,
    CLIPS: tl.constexpr,
) -> None:
    # 127.5 is taken off first: exact, where 1 taken off a quotient would lose digits near zero.
    x0 = (tl.load(pixels + at).to(tl.float32) - 127.5) * (1 / 127.5)
    if CLIPS:
        eps = tl.minimum(tl.maximum(eps, -bound), bound)
    tl.store(z + at, ((1.0 - sigma) * x0 + scale * eps).to(z.dtype.element_ty))


@triton.jit
def _sample_of(
    patch: tl.tensor, start_ptr: tl.tensor, samples: tl.tensor, SAMPLES: tl.constexpr
) -> tl.tensor:
    """The last of the samples that start at or before this patch."""
    sample = tl.arange(0, SAMPLES)
    start = tl.load(start_ptr + sample, mask=sample < samples, other=0)
    return tl.sum(((start <= patch) & (sample < samples)).to(tl.int32), axis=0) - 1


@triton.jit(do_not_specialize=["samples"])
def _noise(
    pixels_ptr: tl.tensor,
    key_ptr: tl.tensor,
    start_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    z_ptr: tl.tensor,
    samples: tl.tensor,
    stride: tl.tensor,
    noise_scale: tl.tensor,
    SAMPLES: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLIPS: tl.constexpr,
) -> None:
    """A program mixes BLOCK quads of one patch: four runs of BLOCK neighbouring columns."""
    patch = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sample = _sample_of(patch, start_ptr, samples, SAMPLES)
    inside = patch - tl.load(start_ptr + sample)
    n0, n1, n2, n3 = _normals(tl.load(key_ptr + sample), inside, quad)
    sigma = tl.load(sigma_ptr + sample)
    scale = sigma * noise_scale
    bound = tl.load(bound_ptr + sample)
    pixels, z = pixels_ptr + patch * stride, z_ptr + patch * (4 * QUADS)
    _mix_one(pixels, z, quad, n0, sigma, scale, bound, CLIPS)
    _mix_one(pixels, z, quad + QUADS, n1, sigma, scale, bound, CLIPS)
    _mix_one(pixels, z, quad + 2 * QUADS, n2, sigma, scale, bound, CLIPS)
    _mix_one(pixels, z, quad + 3 * QUADS, n3, sigma, scale, bound, CLIPS)


@triton.jit(do_not_specialize=["samples", "patches"])
def _sums_of_patches(
    key_ptr: tl.tensor,
    start_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    samples: tl.tensor,
    patches: tl.tensor,
    SAMPLES: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """sums [2, patches]: the sum of each patch's eps, and of their squares."""
    patch = tl.program_id(0).to(tl.int64)
    sample = _sample_of(patch, start_ptr, samples, SAMPLES)
    inside = patch - tl.load(start_ptr + sample)
    key = tl.load(key_ptr + sample)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, QUADS, BLOCK):
        n0, n1, n2, n3 = _normals(key, inside, first + tl.arange(0, BLOCK))
        total += (n0 + n1) + (n2 + n3)
        squares += (n0 * n0 + n1 * n1) + (n2 * n2 + n3 * n3)
    tl.store(sums_ptr + patch, tl.sum(total, axis=0))
    tl.store(sums_ptr + patches + patch, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["patches"])
def _bounds_of_samples(
    sums_ptr: tl.tensor,
    start_ptr: tl.tensor,
    count_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    patches: tl.tensor,
    clip: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """bound [samples]: clip x the (unbiased) standard deviation of the sample's eps."""
    sample = tl.program_id(0)
    start = tl.load(start_ptr + sample)
    count = tl.load(count_ptr + sample)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        here = sums_ptr + start + place
        total += tl.load(here, mask=place < count, other=0.0).to(tl.float64)
        squares += tl.load(here + patches, mask=place < count, other=0.0).to(tl.float64)
    numbers = (count * WIDTH).to(tl.float64)
    mean = tl.sum(total, axis=0) / numbers
    variance = (tl.sum(squares, axis=0) - mean * mean * numbers) / (numbers - 1.0)
    tl.store(bound_ptr + sample, clip * tl.sqrt(variance.to(tl.float32)))
