"""Attention where text was read beforehand: of the text among itself, once; of the rest to everything, every step.

O1's GEN tokens see the whole sample, but the keys and values of its AR tokens never change while a picture is drawn
(hdl/o1/layout.py). So a step has queries of GEN tokens alone, and two kinds of keys and values: `kept` ones of the
AR tokens and its own. cuDNN wants every sequence's keys in adjacent rows; the ones of a layer are placed there just
before they are read, in memory that all layers share. Elsewhere PyTorch's attention takes them side by side.

Of a run of B samples, T AR tokens and G GEN tokens: q [G, heads, d]; k, v [G, kv_heads, d]; kept [2, T, kv_heads, d],
keys and values, or with rows to spare behind the T.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hdl.kernels.attention import CudnnCalls, Sequences, needs_exact_frame, up
from hdl.kernels.place_rows import place_rows
from hdl.o1.attention import attend
from hdl.o1.halves import Half
from hdl.transfer import send

ROUND_TEXT_TO = 256  # rows kept, and the bound of a text's length


class TextAttention:
    """Causal attention of AR tokens alone, sample by sample: as RunAttention, forward only."""

    def __init__(self, ar: Half, device: torch.device, dtype: torch.dtype) -> None:
        self.groups = ar.groups
        self.cudnn: CudnnCalls | None = None
        if not needs_exact_frame(device, dtype):
            self.cudnn = CudnnCalls(device)
            starts, lengths = _empty_numbers(len(ar.lengths), device)
            self.sequences = _sequences(True, max(ar.lengths), max(ar.lengths), starts, lengths)
            _fill(starts, lengths, _starts(ar.lengths), _starts(ar.lengths), ar.lengths, ar.lengths)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Fill out [T, heads * d]; q, k, v as in RunAttention."""
        if self.cudnn:
            self.cudnn.attend(self.sequences, q, k, v, out)
            return
        for group in self.groups:
            out[group] = attend(q[group], k[group], v[group], causal=True).flatten(-2)


@dataclass(frozen=True)
class PictureFrame:
    """The sizes that a step's launches depend on: `gen` rows of x, `text` rows kept, bounds of one sample's tokens.

    halves: what exactly is in the run, where attention depends on all of it; else None.
    """

    gen: int
    samples: int
    text: int
    longest_gen: int
    longest: int
    halves: tuple[tuple[int, ...], tuple[int, ...]] | None

    @classmethod
    def of(cls, ar: Half, gen: Half, exact: bool) -> "PictureFrame":
        """exact: of this very run, with no room to spare for longer texts."""
        longest_gen, longest = max(gen.lengths), max(a + g for a, g in zip(ar.lengths, gen.lengths))
        if exact:
            lengths = ar.lengths, gen.lengths
            return cls(gen.tokens, len(gen.lengths), ar.tokens, longest_gen, longest, lengths)
        text = up(ar.tokens, ROUND_TEXT_TO)
        longest = longest_gen + up(longest - longest_gen, ROUND_TEXT_TO)
        return cls(gen.tokens, len(gen.lengths), text, longest_gen, longest, None)

    def serves(self, ar: Half, gen: Half) -> bool:
        """Whether a run of these halves fits."""
        return self == PictureFrame.of(ar, gen, exact=self.halves is not None)


class PictureAttention:
    """Of all layers of a step. To be loaded before use."""

    def __init__(
        self, frame: PictureFrame, heads: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """heads: kv_heads and d."""
        self.frame = frame
        self.cudnn: CudnnCalls | None = None
        self.groups: list[tuple[Tensor, Tensor]] = []
        if needs_exact_frame(device, dtype):
            assert frame.halves is not None
            return
        self.cudnn = CudnnCalls(device)
        self._starts, self._lengths = _empty_numbers(frame.samples, device)
        self.sequences = _sequences(False, frame.longest_gen, frame.longest, self._starts, self._lengths)
        rows = frame.text + frame.gen
        self.keys, self.values = torch.empty(2, rows, *heads, device=device, dtype=dtype)
        self.text_rows, self.gen_rows = torch.empty(rows, device=device, dtype=torch.int64).split(
            [frame.text, frame.gen]
        )

    def load(self, ar: Half, gen: Half) -> None:
        """Be the attention of this run, which the frame serves."""
        if self.cudnn is None:
            # All runs of an exact frame have the same. A captured step reads the first one's: they have to stay.
            self.groups = self.groups or list(zip(ar.groups, gen.groups))
            return
        whole = [a + g for a, g in zip(ar.lengths, gen.lengths)]
        _fill(self._starts, self._lengths, _starts(gen.lengths), _starts(whole), gen.lengths, whole)
        runs = torch.arange(sum(whole)).split([n for pair in zip(ar.lengths, gen.lengths) for n in pair])
        spare = torch.arange(sum(whole), len(self.keys))  # nobody reads them
        self.text_rows.copy_(send(torch.cat([*runs[::2], spare]), self.text_rows.device))
        self.gen_rows.copy_(send(torch.cat(runs[1::2]), self.gen_rows.device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, out: Tensor) -> None:
        """Fill out [G, heads * d]."""
        if self.cudnn:
            place_rows(kept[0], kept[1], self.text_rows, self.keys, self.values)
            place_rows(k, v, self.gen_rows, self.keys, self.values)
            self.cudnn.attend(self.sequences, q, self.keys, self.values, out)
            return
        for text, own in self.groups:
            keys = torch.cat([kept[0][text], k[own]], dim=1)
            values = torch.cat([kept[1][text], v[own]], dim=1)
            out[own] = attend(q[own], keys, values, causal=False).flatten(-2)


@dataclass(frozen=True)
class OfLayer:
    """One layer's step: as RunAttention, forward only."""

    attention: PictureAttention
    kept: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        self.attention.forward(q, k, v, self.kept, out)


def _empty_numbers(samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts int64 [2, B + 1, 1, 1, 1] and lengths int32 [2, B, 1, 1, 1], of queries and of keys, as cuDNN wants them."""
    starts = torch.empty(2, samples + 1, 1, 1, 1, dtype=torch.int64, device=device)
    return starts, torch.empty(2, samples, 1, 1, 1, dtype=torch.int32, device=device)


def _sequences(
    causal: bool, longest_query: int, longest_key: int, starts: Tensor, lengths: Tensor
) -> Sequences:
    return Sequences(causal, longest_query, longest_key, lengths[0], lengths[1], starts[0], starts[1])


def _fill(
    starts: Tensor, lengths: Tensor,
    query_starts: Sequence[int], key_starts: Sequence[int], query_lengths: Sequence[int], key_lengths: Sequence[int],
) -> None:  # fmt: skip
    for into, numbers in ((starts, (query_starts, key_starts)), (lengths, (query_lengths, key_lengths))):
        into.copy_(send(torch.tensor(numbers, dtype=into.dtype), into.device).view_as(into))


def _starts(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))
