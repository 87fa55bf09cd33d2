"""Where every token of a packed run stands: order, type and 3-D position.

A run of tokens is several samples one after another, without padding. One sample is

    L text tokens, the last two of them <|boi_token|> and <|tms_token|>, then rows*cols patches,
    then the clean patches of its reference images, if it has any.

Every token up to and including <|boi_token|> is autoregressive (AR): it sees the AR tokens of its own
sample up to itself. <|tms_token|> and all patches are generation tokens (GEN): they see their whole
sample. Text token i stands at (t, h, w) = (i, i, i), <|tms_token|> included; the patch at row r and
column c stands at (4096, 4096 + r, 4096 + c). Reference images stand in two places: what the visual tower
sees of each is a grid of tokens inside the text, at (p, p + r, p + c) if p is the next free position, and
its patches' grid follows the picture's, starting one past the largest position before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IMAGE_POSITION = 4096
AR, GEN = 0, 1


Grid = tuple[int, int]  # rows, cols


@dataclass(frozen=True)
class Seen:
    """What the visual tower sees of a reference image: rows x cols tokens, from the text's `start`-th on."""

    start: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Segment:
    """One sample of a run: `text` tokens (boi and tms included), then rows x cols patches to predict.

    references: grids of clean patches after them; seen: the same images among the text tokens, in order.
    """

    text: int
    rows: int
    cols: int
    references: tuple[Grid, ...] = ()
    seen: tuple[Seen, ...] = ()

    @property
    def patches(self) -> int:
        """Those to predict."""
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        return self.text + self.patches + sum(rows * cols for rows, cols in self.references)


@dataclass(frozen=True)
class Group:
    """The segments of one shape: attention takes them as one dense batch."""

    text: int  # L, the same in every segment of the group
    index: Tensor  # int64 [b, tokens]: which tokens of the run belong to each of the b segments


@dataclass(frozen=True)
class Layout:
    """The packed run's bookkeeping; every tensor lives on the device the model runs on.

    S tokens in all, T of them text, P patches to predict, R reference patches, V seen by the visual tower (among
    the T), B segments.
    """

    segments: tuple[Segment, ...]
    positions: Tensor  # int64 [3, S]: t, h, w
    text_index: Tensor  # int64 [T]: where the text tokens stand in the run, sample by sample
    time_index: Tensor  # int64 [B]: where each sample's <|tms_token|> stands
    order: (
        Tensor  # int64 [S]: which row of [T text; B time; P patch; R reference] embeddings each token takes
    )
    patch_index: Tensor  # int64 [P]
    reference_index: Tensor  # int64 [R]
    seen_index: Tensor  # int64 [V]
    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        return self.positions.shape[1]

    def token_types(self) -> Tensor:
        """int64 [S]: 0 for AR tokens, 1 for GEN tokens."""
        types = torch.full((self.tokens,), AR, device=self.positions.device)
        types[self.time_index] = GEN
        types[self.patch_index] = GEN
        types[self.reference_index] = GEN
        return types

    def to(self, device: torch.device | str) -> "Layout":
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Layout":
        """In page-locked memory, from which copying to a GPU does not wait."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        groups = tuple(replace(g, index=change(g.index)) for g in self.groups)
        names = [f.name for f in fields(self) if f.type is Tensor]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, groups=groups, **changed)


def lay_out(segments: list[Segment]) -> Layout:
    """Lay samples one after another (on the CPU). ValueError for a segment without text or patches, or
    with so much text that its positions would run into the image's at 4096."""
    if not segments:
        raise ValueError("a run needs at least one segment")
    positions, texts, times, patches, references, seen = [], [], [], [], [], []
    members: dict[tuple[int, int], list[Tensor]] = {}
    start = 0
    for segment in segments:
        if segment.text < 2 or segment.rows < 1 or segment.cols < 1:
            raise ValueError(f"{segment}: expected at least the two text tokens boi and tms, and one patch")
        positions += [_text_positions(segment), *_patch_positions(segment)]
        run = torch.arange(start, start + segment.tokens)
        text, picture, others = run.tensor_split((segment.text, segment.text + segment.patches))
        texts.append(text)
        times.append(text[-1:])
        patches.append(picture)
        references.append(others)
        seen += [text[s.start : s.start + s.rows * s.cols] for s in segment.seen]
        members.setdefault((segment.text, segment.tokens), []).append(run)
        start += segment.tokens
    places = [torch.cat(parts) for parts in (texts, times, patches, references)]
    order = torch.empty(start, dtype=torch.int64)
    first = 0
    for place in places:  # times after texts: the time embedding replaces the row at <|tms_token|>
        order[place] = torch.arange(first, first + len(place))
        first += len(place)
    text_index, time_index, patch_index, reference_index = places
    return Layout(
        segments=tuple(segments),
        positions=torch.cat(positions, dim=1),
        text_index=text_index,
        time_index=time_index,
        order=order,
        patch_index=patch_index,
        reference_index=reference_index,
        seen_index=torch.cat(seen) if seen else torch.empty(0, dtype=torch.int64),
        groups=tuple(Group(text, torch.stack(runs)) for (text, _), runs in members.items()),
    )


def _text_positions(segment: Segment) -> Tensor:
    """int64 [3, L]."""
    parts, token, position = [], 0, 0
    for seen in segment.seen:
        before = seen.start - token
        parts += [_line(position, before), _grid(position + before, seen.rows, seen.cols)]
        token = seen.start + seen.rows * seen.cols
        position += before + max(seen.rows, seen.cols)
    parts.append(_line(position, segment.text - token))
    last = position + segment.text - token
    if last > IMAGE_POSITION:
        raise ValueError(
            f"{segment}: text up to position {last}, where the image's start at {IMAGE_POSITION}"
        )
    return torch.cat(parts, dim=1)


def _patch_positions(segment: Segment) -> list[Tensor]:
    """int64 [3, rows*cols] of the picture and of each reference."""
    grids, position = [], IMAGE_POSITION
    for rows, cols in ((segment.rows, segment.cols), *segment.references):
        grids.append(_grid(position, rows, cols))
        position = int(grids[-1].max()) + 1
    return grids


def _line(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count).expand(3, -1)


def _grid(start: int, rows: int, cols: int) -> Tensor:
    down = torch.arange(rows).repeat_interleave(cols)
    return start + torch.stack([torch.zeros_like(down), down, torch.arange(cols).repeat(rows)])
