"""How often each sample is drawn in an epoch, when that is not a whole number."""

import numpy as np
import torch

from hdl.seeds import generator_for


class Quotas:
    """A real number of draws a sample and epoch, as whole numbers in every epoch.

    counts: float64 [n], c_i >= 0, not all 0; groups: int [n], such as each sample's source.

    An epoch has `length` N = round(sum of c_i) draws, but at least 1. Sample i is drawn floor(c_i) times, and the
    remaining draws go to the fractional parts f_i = c_i - floor(c_i): by systematic sampling over an order seeded
    by the epoch, in which samples of one group and of one f stay together. So i is drawn floor(c_i) or ceil(c_i)
    times, c_i on average over epochs, and the samples of a group, or of a group and an f, their sum to within one
    in every epoch. Where the sum of c_i is no whole number, the f_i are scaled (to at most 1) to make N one.
    """

    def __init__(self, counts: np.ndarray, groups: np.ndarray | None = None) -> None:
        counts = np.round(np.asarray(counts, dtype=np.float64), 9)  # 0.1 * 30 is 3
        self._whole = np.floor(counts).astype(np.int64)
        self.length = max(1, round(float(counts.sum())))
        self._partial = np.flatnonzero(counts > self._whole)
        self._extra = self.length - int(self._whole.sum())
        self._share = _scaled((counts - self._whole)[self._partial], self._extra)
        self.expected = self._whole.astype(np.float64)  # [n]: draws an epoch on average
        self.expected[self._partial] += self._share
        group = (np.zeros(len(counts), dtype=np.int64) if groups is None else groups)[self._partial]
        self._kind = _numbered(group, self._share)

    def times(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [n]: how often each sample is drawn in this epoch; they sum to `length`."""
        times = self._whole.copy()
        if self._extra:
            generator = generator_for(seed, "draws", epoch)
            shuffled = torch.randperm(len(self._partial), generator=generator).numpy()
            start = float(torch.rand((), generator=generator, dtype=torch.float64))
            order = shuffled[np.argsort(self._kind[shuffled], kind="stable")]
            # Marks stand at start, start + 1, ..., on a line that the samples' shares cover.
            ends = np.cumsum(self._share[order])
            marks = np.ceil(ends * (self._extra / ends[-1]) - start).clip(0, self._extra).astype(np.int64)
            marks[-1] = self._extra
            times[self._partial[order]] += np.diff(marks, prepend=0)
        return times


def _scaled(shares: np.ndarray, total: int) -> np.ndarray:
    """Multiplied by one factor, but to at most 1 each, so that they sum to `total` <= their number."""
    scaled, full = shares, np.zeros(len(shares), dtype=bool)
    while len(shares):
        free = total - int(full.sum())
        left = float(shares[~full].sum())
        scaled = np.where(full, 1.0, shares * (free / left if left else 0.0))
        above = scaled > 1.0
        if not above.any():
            break
        full |= above
    return scaled


def _numbered(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 [n]: 0, 1, ... for the different pairs, in their order."""
    order = np.lexsort((second, first))
    changes = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(changes)])[: len(order)]
    return numbers
