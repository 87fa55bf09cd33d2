"""Packs: micro-batches of as many samples as a budget of tokens holds.

The draws of a lane are packed WINDOW at a time, every window by itself, and a window's packs come in a seeded order.
So every draw is in exactly one pack and waits at most for the packs of its own window, of which there are no more
than WINDOW; and which packs a window gives depends on nothing else. Only how many packs came before it is counted:
from the start, or from a place that a checkpoint remembers, with the same result.

Within a window the largest sample left is joined by the smallest, then by what comes nearest to an even share of the
room left, at last by the largest that fits. That uses up both ends of the sizes first, and the middle ones, which fit
each other, last. It wastes much where just under four samples, say, fit a pack on average: then the large ones should
come in threes, all of the largest, and the rest in fours. So other packings first set as many packs of the largest
aside as makes the count smallest, if the rest go into packs of equal numbers; the best is taken.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import torch

from hdl.data.picks import Draws, Picks
from hdl.errors import HdlError
from hdl.seeds import generator_for

WINDOW = 2048  # draws; waste on BENCH.md's mixed stream: 2.0 % with 1024, 1.9 % with 2048, 1.7 % with 4096
SLACKS = (0.0005, 0.001, 0.002)  # of a pack, that packs of equal numbers may leave unused; all are tried


class Packs:
    """The packs of each lane: `of(lane, number)`.

    draws: the stream; budget: tokens a pack. known: a `state`, of any such packs. HdlError where a sample is larger
    than the budget.
    """

    def __init__(self, draws: Draws, budget: int, known: dict[str, Any] | None = None) -> None:
        _check(draws, budget)
        self.draws, self.budget = draws, budget
        # Of each lane: the first window of which it is known how many packs came before, and these numbers.
        self._from = [(0, [0]) for _ in range(draws.lanes)]
        if known and known.get("budget") == budget and len(known.get("windows", ())) == draws.lanes:
            self._from = [(int(window), [int(first)]) for window, first in known["windows"]]
        self._recent: OrderedDict[tuple[int, int], tuple[Picks, list[np.ndarray]]] = OrderedDict()
        self._lock = Lock()

    def of(self, lane: int, number: int) -> Picks:
        """A lane's number-th pack, its draws in the stream's order."""
        with self._lock:
            window, first = self._window_of(lane, number)
            picks, packs = self._packed(lane, window)
            return picks[packs[number - first]]

    def place(self, lane: int, number: int) -> int:
        """Of the lane's draws, the first of the window in which its number-th pack is."""
        with self._lock:
            return self._window_of(lane, number)[0] * WINDOW

    def state(self, number: int) -> dict[str, Any]:
        """For JSON: what is to be known to go on at each lane's number-th pack without counting from the start."""
        with self._lock:
            windows = [self._window_of(lane, number) for lane in range(self.draws.lanes)]
        return {"budget": self.budget, "windows": [list(pair) for pair in windows]}

    def waste(self) -> float:
        """Share of the budget that the first window's packs leave unused."""
        with self._lock:
            picks, packs = self._packed(0, 0)
        return 1 - float(picks.tokens.sum()) / (len(packs) * self.budget)

    def _window_of(self, lane: int, number: int) -> tuple[int, int]:
        """The window with a pack, and the number of its first one."""
        if number < self._from[lane][1][0]:
            self._from[lane] = (0, [0])
        start, firsts = self._from[lane]
        while number >= firsts[-1]:
            firsts.append(firsts[-1] + len(self._packed(lane, start + len(firsts) - 1)[1]))
        i = bisect_right(firsts, number) - 1
        return start + i, firsts[i]

    def _packed(self, lane: int, window: int) -> tuple[Picks, list[np.ndarray]]:
        key = (lane, window)
        if key not in self._recent:
            picks = self.draws.take(lane, window * WINDOW, (window + 1) * WINDOW)
            packs = packed(picks.tokens, self.budget)
            order = torch.randperm(
                len(packs), generator=generator_for(self.draws.seed, "packs", lane, window)
            )
            self._recent[key] = (picks, [packs[i] for i in order.tolist()])
            while len(self._recent) > 2 * self.draws.lanes:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]


def _check(draws: Draws, budget: int) -> None:
    [info] = draws.mixture.longest(1)
    text = info.longest_text
    if draws.caption_dropout and not info.empty_tokens:
        text = max(text, len(draws.mixture.empty.input_ids))
    patches = info.patches + info.reference_patches
    if patches + text > budget:
        raise HdlError(
            f"train.micro_batch_tokens {budget}: sample {info.key} (of {info.source}) alone has {patches + text} "
            f"tokens, {text} of text and {patches} patches; set at least that many, or prepare the images with a "
            "smaller area"
        )


def packed(tokens: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices of the samples of each pack, ascending. tokens: int64 [n], each at most `budget`."""
    order = np.argsort(tokens, kind="stable")
    sizes = tokens[order]
    ends = _packs_of_the_largest(sizes, budget)
    ways = []
    for count in sorted({0, *(_best_aside(sizes, budget, ends, slack) for slack in SLACKS)}):
        aside = [list(range(a, b)) for b, a in pairwise(ends[: count + 1])]
        ways.append(aside + _filled(sizes[: ends[count]].tolist(), budget))
    best = min(ways, key=len)
    return [np.sort(order[pack]) for pack in best]


def _packs_of_the_largest(sizes: np.ndarray, budget: int) -> list[int]:
    """Of ascending sizes, how many are left when 0, 1, 2, ... packs of the largest are set aside."""
    ends, load = [len(sizes)], 0
    for i, size in zip(range(len(sizes) - 1, -1, -1), sizes[::-1].tolist()):
        if load + size > budget:
            ends.append(i + 1)
            load = 0
        load += size
    return ends


def _best_aside(sizes: np.ndarray, budget: int, ends: list[int], slack: float) -> int:
    """How many of these packs to set aside, if the rest go into packs of equal numbers and a `slack` of each stays
    free."""
    left = np.array(ends)
    each = np.floor(budget * (1 - slack) * left / np.cumsum(sizes)[left - 1]).clip(1)
    return int((np.arange(len(left)) + np.ceil(left / each)).argmin())


def _filled(sizes: list[int], budget: int) -> list[list[int]]:
    """Packs of ascending sizes, as the module says."""
    left, index, total = sizes, list(range(len(sizes))), sum(sizes)
    packs = []
    while left:
        room, pack = budget - left[-1], [index.pop()]
        total -= left.pop()
        while left and left[0] <= room:
            more = round(room * len(left) / total)  # how many of average size there is room for
            if more <= 1:
                i = bisect_right(left, room) - 1
            elif len(pack) == 1:
                i = 0
            else:
                i = min(bisect_left(left, room / more), bisect_right(left, room) - 1)
            size = left.pop(i)
            pack.append(index.pop(i))
            room, total = room - size, total - size
        packs.append(pack)
    return packs
