"""Reading what was drawn, also when shards get lost.

A sample of a lost shard is replaced by one of the same rows and cols, since every rank has already counted the
step's patches: the next one of a seeded order, from a place in it that the draw's number gives, in a shard that is
not lost. One whose caption and references are no longer come first, so that packs stay within their budget where
that is possible.
"""

from dataclasses import replace
from threading import Lock

import numpy as np

from hdl.data.fetch import ShardLost
from hdl.data.mirror import mirrored
from hdl.data.mixture import Mixture
from hdl.data.picks import Picks
from hdl.data.samples import NO_CAPTION, Sample
from hdl.errors import HdlError
from hdl.seeds import uniform_at


class Reader:
    """Of one rank; `read` may be called from several threads.

    max_lost: share of samples whose shards may be lost. lost: what was lost and why, a line each.
    """

    def __init__(self, mixture: Mixture, seed: int, max_lost: float, rank: int = 0) -> None:
        self.mixture, self.seed, self.max_lost, self.rank = mixture, seed, max_lost, rank
        self.lost: dict[str, str] = {}
        self._gone = np.zeros(len(mixture.columns.shards), dtype=bool)
        self._lock = Lock()

    def read(self, picks: Picks) -> list[Sample]:
        """HdlError where too much is lost, or nothing of the same size is left."""
        return [self._read(picks, i) for i in range(len(picks))]

    def _read(self, picks: Picks, i: int) -> Sample:
        number, sample, caption = (int(values[i]) for values in (picks.number, picks.sample, picks.caption))
        while True:
            try:
                read = self.mixture.read(sample, caption)
                break
            except ShardLost as error:
                self._lose(sample, error)
                sample, caption = self._substitute(picks, i, number, sample)
        if picks.mirrored[i] and self.mixture.columns.mirrored[sample]:
            references = tuple((grid, mirrored(patches, *grid)) for grid, patches in read.references)
            read = replace(read, patches=mirrored(read.patches, read.rows, read.cols), references=references)
        return read

    def _lose(self, sample: int, error: ShardLost) -> None:
        columns = self.mixture.columns
        with self._lock:
            shard = int(columns.shard[sample])
            if self._gone[shard]:
                return
            self._gone[shard] = True
            source, name = columns.shards[shard]
            self.lost[f"{self.mixture.sources[source].shown}: {name}"] = str(error)
            drawn = self.mixture.quotas.expected > 0
            share = float(self._gone[columns.shard[drawn]].mean())
        said = f"shard {name} is lost, with {share:.1%} of the samples in all: {error}"
        if share > self.max_lost:
            raise HdlError(
                f"{len(self.lost)} shard(s) lost, {share:.1%} of the samples, where data.max_lost allows "
                f"{self.max_lost:.1%}: {'; '.join(self.lost.values())}. See that they can be read and resume"
            )
        print(f"rank {self.rank}: {said}; others take their places", flush=True)

    def _substitute(self, picks: Picks, i: int, number: int, lost: int) -> tuple[int, int]:
        """Another sample, and which of its captions."""
        columns, quotas = self.mixture.columns, self.mixture.quotas
        same = (columns.rows == columns.rows[lost]) & (columns.cols == columns.cols[lost])
        same &= (quotas.expected > 0) & ~self._gone[columns.shard]
        same &= self.mixture.loss_weight == self.mixture.loss_weight[lost]
        candidates = np.flatnonzero(same)
        if not len(candidates):
            raise HdlError(
                f"{'; '.join(self.lost.values())}. No other sample of {columns.rows[lost]} x {columns.cols[lost]} "
                "patches is left to take the place of those lost; see that the shard can be read and resume"
            )
        captions = np.full(len(candidates), NO_CAPTION)
        if picks.caption[i] != NO_CAPTION:
            captions = picks.caption[i] % columns.captions[candidates]
        text = self.mixture.empty_text(candidates)
        if picks.caption[i] != NO_CAPTION:
            text = columns.text_tokens(candidates, captions)
        short = text + columns.references[candidates] <= picks.tokens[i] - picks.patches[i]
        if short.any():
            candidates, captions = candidates[short], captions[short]
        place = uniform_at(candidates, self.seed, "substitutes")
        start = float(uniform_at(np.array([number]), self.seed, "substitute")[0])
        first = int(((place - start) % 1.0).argmin())
        return int(candidates[first]), int(captions[first])
