"""The order in which samples are drawn: an endless stream, every epoch of it in another order.

A place of the stream is a pure function of the seed, so nothing of it is ever saved. By default an epoch is a
permutation of all its draws. For shards that have to be fetched:

    window  an epoch takes the shards in a seeded order, `window` at a time, and mixes within these only
    lanes   the epoch's order is cut into `lanes` contiguous parts that are read side by side, each as a stream of
            its own: a node that is given one lane needs that part's shards only

Of the first e epochs, lane l takes floor((e N + l) / L) draws: this sums to e N over the L lanes, each epoch's parts
are N / L rounded down or up, by turns, and at no place have two lanes taken numbers that differ by more than one.
"""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from hdl.data.quotas import Quotas
from hdl.seeds import generator_for

RECENT_EPOCHS = 2


@dataclass(frozen=True)
class Drawn:
    """A run of draws."""

    number: np.ndarray  # int64 [k]: of the draw, different for every draw of every lane
    sample: np.ndarray  # int64 [k]
    turn: (
        np.ndarray
    )  # int64 [k]: how often this sample was to be drawn before: floor(epoch c_i), plus in its epoch


class Stream:
    """quotas: draws an epoch of each of n samples; shard: int [n], the shard each lies in, or None for one;
    window: shards mixed at a time, None for all of them."""

    def __init__(
        self, quotas: Quotas, seed: int, *,
        shard: np.ndarray | None = None, window: int | None = None, lanes: int = 1,
    ) -> None:  # fmt: skip
        self.quotas, self.seed, self.window, self.lanes = quotas, seed, window, lanes
        self._shard = shard
        self._recent: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def draws(self, lane: int, start: int, stop: int) -> Drawn:
        """Places start .. stop - 1 of a lane."""
        place = np.arange(start, stop, dtype=np.int64)
        length, lanes = self.quotas.length, self.lanes
        epoch = ((place + 1) * lanes - lane - 1) // length  # the last one that begins at or before the place
        sample, nth = np.empty(len(place), np.int64), np.empty(len(place), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            drawn, repeat = self._epoch(e)
            at = place[here] - self._taken(e, lane) + self._part(e, lane)
            sample[here], nth[here] = drawn[at], repeat[at]
        turn = np.floor(epoch * self.quotas.expected[sample] + 1e-6).astype(np.int64) + nth
        return Drawn(place * lanes + lane, sample, turn)

    def _taken(self, epoch: int, lane: int) -> int:
        """Draws that a lane has taken when an epoch begins."""
        return (epoch * self.quotas.length + lane) // self.lanes

    def _part(self, epoch: int, lane: int) -> int:
        """Where in an epoch's order a lane's part begins."""
        return sum(self._taken(epoch + 1, other) - self._taken(epoch, other) for other in range(lane))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [N]: the samples drawn, in order, and how often each has been drawn in this epoch before."""
        with self._lock:
            if epoch not in self._recent:
                self._recent[epoch] = self._arranged(epoch)
                while len(self._recent) > RECENT_EPOCHS:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(epoch)
            return self._recent[epoch]

    def _arranged(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        times = self.quotas.times(self.seed, epoch)
        drawn = np.repeat(np.arange(len(times), dtype=np.int32), times)
        nth = (np.arange(len(drawn)) - np.repeat(np.cumsum(times) - times, times)).astype(np.int32)
        order = torch.randperm(len(drawn), generator=generator_for(self.seed, "epoch", epoch)).numpy()
        if self._shard is not None and self.window is not None:
            shards = int(self._shard.max()) + 1
            turn = torch.randperm(shards, generator=generator_for(self.seed, "shards", epoch)).numpy()
            order = order[np.argsort((turn // self.window)[self._shard[drawn[order]]], kind="stable")]
        return drawn[order], nth[order]


def samples_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Of `count` samples, each drawn once an epoch: those of a step's batch."""
    stream = Stream(Quotas(np.ones(count)), seed)
    return stream.draws(0, step * batch_size, (step + 1) * batch_size).sample.tolist()
