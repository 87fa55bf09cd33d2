"""What exactly is drawn at a place of the stream: a sample, with which of its captions, mirrored or not.

All of it is a function of the seed and the draw's number. A sample's captions take turns over its draws, from one
that the seed chooses, so that each is used equally often.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from hdl.data.mixture import Mixture
from hdl.data.order import Stream
from hdl.data.samples import NO_CAPTION
from hdl.seeds import uniform_at


@dataclass(frozen=True)
class Picks:
    """k draws."""

    number: np.ndarray  # int64 [k]: of the draw
    sample: np.ndarray  # int64 [k]
    caption: np.ndarray  # int64 [k]: number of the caption; NO_CAPTION: the empty prompt
    mirrored: np.ndarray  # bool [k]
    patches: np.ndarray  # int64 [k]
    tokens: (
        np.ndarray
    )  # int64 [k]: of text, patches and references' patches; what text is put in place has no more
    kept: np.ndarray  # bool [k]: asked for without the trigger and pulled to the base's own prediction

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, which: slice | np.ndarray) -> "Picks":
        return Picks(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["Picks"]) -> "Picks":
        return cls(*(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(cls)))


class Draws:
    """A mixture's samples, as the lanes of a stream draw them.

    caption_dropout: share of draws with the empty prompt; mirror: whether half of those that may be are mirrored;
    window, lanes: as Stream takes them; kept_share: of draws, evenly spread over a lane, so that small batches too
    have their share; keep_regularization: whether draws of regularization sources are kept besides.
    """

    def __init__(
        self, mixture: Mixture, seed: int, *,
        caption_dropout: float = 0.0, mirror: bool = False, window: int | None = None, lanes: int = 1,
        kept_share: float = 0.0, keep_regularization: bool = False,
    ) -> None:  # fmt: skip
        self.mixture, self.seed = mixture, seed
        self.caption_dropout, self.mirror = caption_dropout, mirror
        self.window, self.lanes = window, lanes
        self.kept_share, self.keep_regularization = kept_share, keep_regularization
        self._stream = Stream(mixture.quotas, seed, shard=mixture.columns.shard, window=window, lanes=lanes)

    def take(self, lane: int, start: int, stop: int) -> Picks:
        """Places start .. stop - 1 of a lane."""
        drawn = self._stream.draws(lane, start, stop)
        number, sample, columns, seed = drawn.number, drawn.sample, self.mixture.columns, self.seed
        captions = columns.captions[sample]
        first = (uniform_at(sample, seed, "first caption") * captions).astype(np.int64)
        caption = (first + drawn.turn) % captions
        text = columns.text_tokens(sample, caption)
        if self.caption_dropout:
            dropped = uniform_at(number, seed, "caption dropout") < self.caption_dropout
            caption = np.where(dropped, NO_CAPTION, caption)
            text = np.where(dropped, self.mixture.empty_text(sample), text)
        mirrored = np.zeros(len(sample), dtype=bool)
        if self.mirror:
            mirrored = columns.mirrored[sample] & (uniform_at(number, seed, "mirror") < 0.5)
        patches = columns.patches(sample).astype(np.int64)
        tokens = patches + text + columns.references[sample]
        return Picks(
            number, sample, caption, mirrored, patches, tokens, self._kept(np.arange(start, stop), sample)
        )

    def _kept(self, place: np.ndarray, sample: np.ndarray) -> np.ndarray:
        kept = np.floor((place + 1) * self.kept_share) > np.floor(place * self.kept_share)
        if self.keep_regularization:
            kept |= self.mixture.regularization[sample]
        return kept
