"""What is trained on: several sources of prepared samples, and how often each sample is drawn in an epoch.

Sample i counts

    c_i = repeats of its source  x  the multipliers of its tags and its style, the run's and its source's own

and an epoch has N = round(sum of c_i) draws, but at least 1. Where sources have weights, a source s with samples
gets the share w_s / sum of w of these N draws, and its c_i are scaled to it. In every epoch a sample is drawn c_i
times, rounded down or up and c_i on average (exactly how: hdl/data/quotas.py); a count of 0 leaves it out.

Held out for validation, and counted nowhere, is every image whose hash lies below the share asked for: a function
of the image file alone, so that all its views, in all sources, are held out together, whatever the seed. Sources of
regularization images are trained on whole; what they add to the loss has a factor of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hdl.config import Data
from hdl.data.columns import Columns
from hdl.data.elsewhere import CacheOptions
from hdl.data.quotas import Quotas
from hdl.data.samples import NO_CAPTION, Prompt, Sample, SampleInfo
from hdl.data.shards import Shards
from hdl.errors import HdlError

SHOWN_TAGS = 20


@dataclass(frozen=True)
class Source:
    """repeats: of each sample in an epoch; weight: its share of the draws, to the other sources'; tags: own
    multipliers by tag or style."""

    name: str
    shards: Shards
    repeats: float = 1.0
    weight: float | None = None
    regularization: bool = False
    tags: dict[str, float] | None = None

    @property
    def shown(self) -> str:
        """Where its shards lie, for messages."""
        return self.shards.home.shown


class Mixture:
    """The samples of all sources, numbered one source after another.

    columns: of all samples; quotas: draws of each; held_out: int64, the numbers of the samples held out, in an
    order of their own; loss_weight: float32 [n], the factor of each sample's loss; regularization: bool [n], whether
    it is of such a source. Raises HdlError where a tag is
    nobody's, nothing is left to train on, or pairs were prepared before they could be trained on.
    """

    def __init__(
        self, sources: Sequence[Source], *,
        tags: dict[str, float] | None = None, held_out: float = 0.0, regularization_weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.sources, self._tags = list(sources), tags or {}
        self.columns = columns = Columns.of([source.shards.infos for source in sources])
        sizes = [len(source.shards.infos) for source in sources]
        self._first = np.cumsum([0, *sizes])
        _check_pairs(self.sources, columns)
        self.regularization = np.array([source.regularization for source in sources])[columns.source]
        regularization = self.regularization
        counts = self._counts()
        drawn = (counts > 0) & np.array([source.weight != 0 for source in sources])[columns.source]
        kept_back = (columns.image < held_out) & ~regularization & drawn
        if held_out and drawn.any() and not kept_back.any():
            raise HdlError(
                f"data.held_out {held_out:g}: of {np.unique(columns.image[drawn & ~regularization]).size:,} images none is in "
                "that share, which goes by a hash of each; raise it, or set it to 0"
            )
        chosen = np.flatnonzero(kept_back)
        self.held_out = chosen[np.lexsort((chosen, columns.image[chosen]))]
        self.loss_weight = np.where(regularization, regularization_weight, 1.0).astype(np.float32)
        counts = np.where(kept_back, 0.0, counts)
        if not counts.sum() > 0:
            raise HdlError(_why_empty(self.sources, columns, kept_back))
        self.quotas = Quotas(_weighted(self.sources, columns, counts), columns.source)

    @property
    def empty(self) -> Prompt:
        """The empty prompt; the same in all sources, which are of one base."""
        return self.sources[0].shards.empty

    @property
    def dataset_hash(self) -> str:
        """Identifies the data, not how they are mixed."""
        hashes = [source.shards.dataset_hash for source in self.sources]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def pairs(self) -> int:
        """Samples with reference images, for editing."""
        return int((self.columns.references > 0).sum())

    def empty_text(self, sample: np.ndarray) -> np.ndarray:
        """int: tokens of these samples' empty prompts."""
        own = self.columns.empty_text[sample]
        return np.where(own > 0, own, len(self.empty.input_ids))

    def info(self, sample: int) -> SampleInfo:
        source, i = self._place(sample)
        return source.shards.infos[i]

    def read(self, sample: int, caption: int) -> Sample:
        """caption: NO_CAPTION for the empty prompt. HdlError as Shards.read: ShardLost among them."""
        source, i = self._place(sample)
        if caption != NO_CAPTION or self.columns.references[sample]:
            return source.shards.read(i, caption)
        empty = self.empty
        read = source.shards.read(i, 0)
        return replace(read, input_ids=empty.input_ids, text_embeds=empty.text_embeds, caption="")

    def longest(self, count: int, prompt: int = 0) -> list[SampleInfo]:
        """At most `count` samples that are trained on: those with the most tokens, with their longest caption. prompt:
        tokens of one that may take a caption's place."""
        trained = np.flatnonzero(self.quotas.expected > 0)
        columns = self.columns
        text = np.maximum(columns.longest_text()[trained], prompt)
        tokens = (columns.patches(trained) + columns.references[trained]) + text
        infos = [self.info(i) for i in trained[np.argsort(-tokens, kind="stable")[:count]].tolist()]
        return [replace(info, text_tokens=[*info.text_tokens, prompt]) for info in infos]

    def parts(self) -> dict[str, np.ndarray]:
        """What shares are told of: bool [n] of each source, where there are several, and of each tag with a
        multiplier."""
        columns = self.columns
        parts = {}
        if len(self.sources) > 1:
            parts = {source.name: columns.source == s for s, source in enumerate(self.sources)}
        tags = {*self._tags, *(tag for source in self.sources for tag in source.tags or {})}
        for tag in sorted(tags):
            has = np.zeros(len(columns), dtype=bool)
            has[columns.tags[tag]] = True
            parts[f"tag {tag}" if tag in parts else tag] = has
        return parts

    def describe(self) -> str:
        """The mixture asked for, a line each: samples and share of the draws."""
        expected, length = self.quotas.expected, self.quotas.length
        regularization = {source.name for source in self.sources if source.regularization}
        lines = [f"mixture: an epoch is {length:,} draws of {int((expected > 0).sum()):,} samples"]
        if len(self.held_out):
            lines[0] += f"; {len(self.held_out):,} more are held out"
        for name, part in self.parts().items():
            note = " (regularization)" if name in regularization else ""
            drawn = part & (expected > 0)
            share = float(expected[part].sum()) / length
            lines.append(f"  {name}: {int(drawn.sum()):,} samples, {share:.2%} of the draws{note}")
        return "\n".join(lines)

    def _place(self, sample: int) -> tuple[Source, int]:
        s = int(self.columns.source[sample])
        return self.sources[s], int(sample - self._first[s])

    def _counts(self) -> np.ndarray:
        """float64 [n]: c_i, before weights."""
        columns = self.columns
        counts = np.array([source.repeats for source in self.sources], dtype=np.float64)[columns.source]
        for tag, multiplier in self._tags.items():
            counts[self._with_tag("data.tags", tag, columns.tags.get(tag))] *= multiplier
        for s, source in enumerate(self.sources):
            for tag, multiplier in (source.tags or {}).items():
                anywhere = columns.tags.get(tag, np.zeros(0, dtype=np.int32))
                here = anywhere[columns.source[anywhere] == s]
                counts[self._with_tag(f"data.sources.{source.name}.tags", tag, here)] *= multiplier
        return counts

    def _with_tag(self, where: str, tag: str, samples: np.ndarray | None) -> np.ndarray:
        if samples is None or not len(samples):
            known = sorted(self.columns.tags, key=lambda tag: (-len(self.columns.tags[tag]), tag))
            more = ", ..." if len(known) > SHOWN_TAGS else ""
            raise HdlError(
                f"{where}: no sample has the tag or style {tag!r}; known are: "
                f"{', '.join(known[:SHOWN_TAGS]) or 'none'}{more}. Tags and styles come from styles.json when the "
                "images are prepared"
            )
        return samples


def open_mixture(data: Data, fingerprint: str | None) -> Mixture:
    """The mixture that a run's config describes. fingerprint: of the base to train.

    HdlError where a source cannot be opened or is of another base, and as Mixture.
    """
    elsewhere = CacheOptions(gib=data.cache_gib, storage=data.storage)
    if data.cache is not None:
        elsewhere = replace(elsewhere, folder=data.cache)
    sources = []
    for name, s in data.all_sources().items():
        try:
            shards = Shards(s.shards, fingerprint, elsewhere)
        except HdlError as error:
            raise HdlError(f"data.sources.{name}: {error}" if data.sources else str(error)) from None
        sources.append(Source(name, shards, s.repeats, s.weight, s.regularization, s.tags))
    return Mixture(
        sources,
        tags=data.tags,
        held_out=data.held_out,
        regularization_weight=data.regularization_weight,
    )


def _weighted(sources: Sequence[Source], columns: Columns, counts: np.ndarray) -> np.ndarray:
    """The counts, scaled to the sources' weights where they have any."""
    if all(source.weight is None for source in sources):
        return counts
    sums = np.bincount(columns.source, counts, len(sources))
    weights = np.array([source.weight or 0.0 for source in sources])
    nothing = [s.name for s, total, weight in zip(sources, sums, weights) if weight > 0 and not total > 0]
    if nothing:
        raise HdlError(
            f"data.sources.{nothing[0]}: its weight asks for draws, but none of its samples is left to train on; "
            "look at its repeats and tags and at data.tags and data.held_out, or leave the source out"
        )
    if not weights.sum() > 0:
        raise HdlError("data.sources: every weight is 0; give at least one source a weight above 0")
    draws = max(1, round(float(counts.sum()))) * weights / weights.sum()
    factors = np.divide(draws, sums, out=np.zeros(len(sums)), where=sums > 0)
    return counts * factors[columns.source]


def _check_pairs(sources: Sequence[Source], columns: Columns) -> None:
    for s, source in enumerate(sources):
        old = int(((columns.references > 0) & (columns.empty_text == 0) & (columns.source == s)).sum())
        if old:
            raise HdlError(
                f"{source.shown}: {old:,} of its samples are paired with reference images, for editing, and were "
                "prepared by an earlier hdl, which left no room for these in the prompts; run tools/prepare.py again "
                "with the same options"
            )


def _why_empty(sources: Sequence[Source], columns: Columns, kept_back: np.ndarray) -> str:
    names = ", ".join(source.shown for source in sources)
    if not len(columns):
        return f"nothing to train on: {names} has no samples; prepare images first"
    if kept_back.all():
        return f"nothing to train on: all {len(columns):,} samples are held out; lower data.held_out"
    return (
        f"nothing to train on: repeats and the multipliers of tags leave none of the {len(columns):,} samples of "
        f"{names}; give some of them a multiplier above 0"
    )
