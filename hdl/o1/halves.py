"""The two kinds of tokens of a packed run, each as a run of its own: text is read once, pictures step after step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hdl.o1.layout import AR, Layout


@dataclass(frozen=True)
class Half:
    """The AR tokens of a run, or its GEN tokens: n of its tokens, in its order.

    index: int64 [n], where they stand in the run; lengths: how many each of the B segments has; groups: for every
    group of the layout, where its b segments' tokens stand among the n, int64 [b, n / b].
    """

    index: Tensor
    lengths: tuple[int, ...]
    groups: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def halves(layout: Layout) -> tuple[Half, Half]:
    """The AR tokens and the GEN tokens."""
    is_ar = layout.token_types() == AR
    texts = [segment.text - 1 for segment in layout.segments]
    others = [segment.tokens - text for segment, text in zip(layout.segments, texts)]
    ar = _half(is_ar, texts, [group.index[:, : group.text - 1] for group in layout.groups])
    gen = _half(~is_ar, others, [group.index[:, group.text - 1 :] for group in layout.groups])
    return ar, gen


def places_among(chosen: Tensor, index: Tensor) -> Tensor:
    """Where tokens `index` of a run stand among the `chosen` ones (bool [S]), of which they all are."""
    return (chosen.cumsum(0) - 1)[index]


def _half(chosen: Tensor, lengths: list[int], groups: list[Tensor]) -> Half:
    placed = tuple(places_among(chosen, group) for group in groups)
    return Half(torch.nonzero(chosen).squeeze(1), tuple(lengths), placed)
