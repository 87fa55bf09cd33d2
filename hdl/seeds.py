"""Every random number of a run is a pure function of the run's seed and of where it is used.

There is no generator whose state has to be carried along: the noise of sample 5 of step 300 comes from
a seed derived from (run seed, "noise", 300, 5). So one rank or eight draw the same noise for the same
sample, and resuming needs nothing but the step's number.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any names and numbers; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def uniform_at(numbers: np.ndarray, *parts: int | str) -> np.ndarray:
    """float64 in [0, 1) for each of the integers `numbers`, millions at once: splitmix64's output function of the
    number and `derive_seed(*parts)`."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive_seed(*parts))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run code that draws from torch's global generators (a library's initialisation, dropout) from a
    seed, and leave the generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
