"""Which draws a step trains on, in which micro-batches, on which rank.

Two ways to cut the stream into steps. By samples: a step is batch_size draws, in micro-batches of a fixed number. By
tokens: a step is batch_packs packs (hdl/data/packing.py), whatever number of samples is in them. Of L lanes, lane l
serves the l-th of L equal parts of every step. Both are functions of the step's number alone.

Ranks deal a step's micro-batches out among them so that their tokens are as even as equal numbers of micro-batches
allow. With several lanes, ranks and lanes go in equally many groups, and a group deals out what its lanes serve: if
lanes are as many as nodes, a node reads only its own lane's shards.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np

from hdl.data.packing import WINDOW, Packs
from hdl.data.picks import Draws, Picks
from hdl.errors import HdlError

RECENT_STEPS = 16


class Cut(Protocol):
    """A way to cut the stream into steps."""

    draws: Draws
    mixed: int  # draws of a lane among which a step's may come in another order than the stream's

    def packs(self, step: int) -> list[Picks]:
        """The step's micro-batches."""

    def place(self, lane: int, step: int) -> int:
        """A place of the lane that is not after those of the step, nor long before."""

    def state(self, step: int) -> dict[str, Any] | None:
        """For a checkpoint after `step` steps, where finding the place again would take long."""

    def describe(self) -> str:
        """What a step is."""


class BySamples:
    mixed = 0

    def __init__(self, draws: Draws, batch_size: int, micro_batch_size: int) -> None:
        """HdlError where the lanes cannot share the batch."""
        _check_lanes(draws.lanes, "train.batch_size", batch_size)
        self.draws, self.batch_size, self.micro_batch_size = draws, batch_size, micro_batch_size

    def packs(self, step: int) -> list[Picks]:
        share, lanes = self.batch_size // self.draws.lanes, range(self.draws.lanes)
        picks = Picks.joined([self.draws.take(lane, step * share, (step + 1) * share) for lane in lanes])
        micro = self.micro_batch_size
        return [picks[first : first + micro] for first in range(0, self.batch_size, micro)]

    def place(self, lane: int, step: int) -> int:
        return step * (self.batch_size // self.draws.lanes)

    def state(self, step: int) -> None:
        return None

    def describe(self) -> str:
        return f"{self.batch_size} images a step"


class ByTokens:
    mixed = WINDOW

    def __init__(self, packs: Packs, batch_packs: int) -> None:
        """HdlError where the lanes cannot share the packs."""
        _check_lanes(packs.draws.lanes, "train.batch_packs", batch_packs)
        self.draws, self._packs, self.batch_packs = packs.draws, packs, batch_packs

    def packs(self, step: int) -> list[Picks]:
        share = self.batch_packs // self.draws.lanes
        numbers = range(step * share, (step + 1) * share)
        return [self._packs.of(lane, number) for lane in range(self.draws.lanes) for number in numbers]

    def place(self, lane: int, step: int) -> int:
        return self._packs.place(lane, step * (self.batch_packs // self.draws.lanes))

    def state(self, step: int) -> dict[str, Any]:
        return self._packs.state(step * (self.batch_packs // self.draws.lanes))

    def describe(self) -> str:
        return f"{self.batch_packs} packs of {self._packs.budget} tokens a step, {self._packs.waste():.1%} of them unused"


@dataclass(frozen=True)
class Plan:
    """A step. packs: its micro-batches; dealt: of each rank, the numbers of those it takes."""

    packs: list[Picks]
    dealt: list[list[int]]

    @property
    def samples(self) -> int:
        return sum(len(pack) for pack in self.packs)

    @property
    def patches(self) -> int:
        return sum(self.patches_of_each)

    @property
    def patches_of_each(self) -> list[int]:
        """By the samples' places."""
        return [int(patches) for pack in self.packs for patches in pack.patches]

    @property
    def tokens(self) -> int:
        return sum(int(pack.tokens.sum()) for pack in self.packs)

    def places(self, pack: int) -> list[int]:
        """Of a micro-batch's samples among the step's."""
        first = sum(len(other) for other in self.packs[:pack])
        return list(range(first, first + len(self.packs[pack])))


class Steps:
    """The plans of all steps, for `world` ranks."""

    def __init__(self, cut: Cut, world: int) -> None:
        self.cut, self.world = cut, world
        self.groups = math.gcd(cut.draws.lanes, world)
        self._recent: OrderedDict[int, Plan] = OrderedDict()
        self._lock = Lock()

    def plan(self, step: int) -> Plan:
        with self._lock:
            if step not in self._recent:
                packs = self.cut.packs(step)
                self._recent[step] = Plan(packs, self._dealt([int(pack.tokens.sum()) for pack in packs]))
                while len(self._recent) > RECENT_STEPS:
                    self._recent.popitem(last=False)
            return self._recent[step]

    def lanes_of(self, rank: int) -> range:
        """The lanes that a rank reads."""
        lanes = self.cut.draws.lanes // self.groups
        group = rank // (self.world // self.groups)
        return range(group * lanes, (group + 1) * lanes)

    def shards_needed(self, step: int, rank: int, shards: int) -> dict[int, list[str]]:
        """Names of about the next `shards` shards that a rank reads from, from a step on, in this order, of each
        source's number."""
        draws, order = self.cut.draws, dict[int, None]()
        mixture, at_once = draws.mixture, 1024
        places = {lane: self.cut.place(lane, step) for lane in self.lanes_of(rank)}
        for gone_through in range(0, mixture.quotas.length // draws.lanes + 1, at_once):
            if len(order) >= shards and gone_through >= 2 * self.cut.mixed:
                break
            for lane, place in places.items():
                first = place + gone_through
                drawn = mixture.columns.shard[draws.take(lane, first, first + at_once).sample]
                firsts = np.sort(np.unique(drawn, return_index=True)[1])
                order |= dict.fromkeys(drawn[firsts].tolist())
        needed: dict[int, list[str]] = {}
        for shard in order:
            source, name = mixture.columns.shards[shard]
            needed.setdefault(source, []).append(name)
        return needed

    def _dealt(self, tokens: Sequence[int]) -> list[list[int]]:
        """Largest first, to the rank with the fewest tokens that may still take one."""
        dealt: list[list[int]] = []
        packs, ranks = len(tokens) // self.groups, self.world // self.groups
        for group in range(self.groups):
            mine: list[list[int]] = [[] for _ in range(ranks)]
            loads = [0] * ranks
            for i in sorted(range(group * packs, (group + 1) * packs), key=lambda i: (-tokens[i], i)):
                open_ones = [r for r in range(ranks) if len(mine[r]) < packs // ranks]
                rank = min(open_ones, key=lambda r: loads[r])
                mine[rank].append(i)
                loads[rank] += tokens[i]
            dealt += [sorted(numbers) for numbers in mine]
        return dealt


def _check_lanes(lanes: int, option: str, found: int) -> None:
    if found % lanes:
        raise HdlError(
            f"{option} {found} is not a multiple of data.lanes {lanes}: every lane serves an equal part of a step; "
            "set another of the two"
        )
