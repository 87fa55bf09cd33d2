"""Where every token of a packed run stands: order, type and 3-D position.

A run of tokens is several samples one after another, without padding. One sample is

    L text tokens, the last two of them <|boi_token|> and <|tms_token|>, then rows*cols patches.

Every token up to and including <|boi_token|> is autoregressive (AR): it sees the AR tokens of its own
sample up to itself. <|tms_token|> and the patches are generation tokens (GEN): they see their whole
sample. Text token i stands at (t, h, w) = (i, i, i), <|tms_token|> included; the patch at row r and
column c stands at (4096, 4096 + r, 4096 + c).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IMAGE_POSITION = 4096
AR, GEN = 0, 1


@dataclass(frozen=True)
class Segment:
    """One sample of a run: `text` tokens (boi and tms included), then rows x cols patches."""

    text: int
    rows: int
    cols: int

    @property
    def patches(self) -> int:
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        return self.text + self.patches


@dataclass(frozen=True)
class Group:
    """The segments of one shape: attention takes them as one dense batch."""

    text: int  # L, the same in every segment of the group
    index: Tensor  # int64 [b, L + N]: which tokens of the run belong to each of the b segments


@dataclass(frozen=True)
class Layout:
    """The packed run's bookkeeping; every tensor lives on the device the model runs on.

    S tokens in all, T of them text, P of them patches, B segments.
    """

    segments: tuple[Segment, ...]
    positions: Tensor  # int64 [3, S]: t, h, w
    text_index: Tensor  # int64 [T]: where the text tokens stand in the run, sample by sample
    time_index: Tensor  # int64 [B]: where each sample's <|tms_token|> stands
    order: Tensor  # int64 [S]: which row of [T text; B time; P patch] embeddings each token of the run takes
    patch_index: Tensor  # int64 [P]
    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        return self.positions.shape[1]

    def token_types(self) -> Tensor:
        """int64 [S]: 0 for AR tokens, 1 for GEN tokens."""
        types = torch.full((self.tokens,), AR, device=self.positions.device)
        types[self.time_index] = GEN
        types[self.patch_index] = GEN
        return types

    def to(self, device: torch.device | str) -> "Layout":
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Layout":
        """In page-locked memory, from which copying to a GPU does not wait."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        groups = tuple(replace(g, index=change(g.index)) for g in self.groups)
        names = ("positions", "text_index", "time_index", "patch_index", "order")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, groups=groups, **changed)


def lay_out(segments: list[Segment]) -> Layout:
    """Lay samples one after another (on the CPU). ValueError for a segment without text or patches, or
    with so much text that its positions would run into the image's at 4096."""
    if not segments:
        raise ValueError("a run needs at least one segment")
    positions, text_index, time_index, patch_index = [], [], [], []
    members: dict[tuple[int, int], list[Tensor]] = {}
    start = 0
    for segment in segments:
        if segment.text < 2 or segment.rows < 1 or segment.cols < 1:
            raise ValueError(f"{segment}: expected at least the two text tokens boi and tms, and one patch")
        if segment.text > IMAGE_POSITION:
            raise ValueError(
                f"{segment}: more than {IMAGE_POSITION} text tokens, where the image's positions start"
            )
        positions.append(torch.arange(segment.text).expand(3, -1))
        grid = torch.stack(
            [
                torch.zeros(segment.patches, dtype=torch.int64),
                torch.arange(segment.rows).repeat_interleave(segment.cols),
                torch.arange(segment.cols).repeat(segment.rows),
            ]
        )
        positions.append(grid + IMAGE_POSITION)
        run = torch.arange(start, start + segment.tokens)
        text_index.append(run[: segment.text])
        time_index.append(start + segment.text - 1)
        patch_index.append(run[segment.text :])
        members.setdefault((segment.text, segment.patches), []).append(run)
        start += segment.tokens
    texts, times, patches = torch.cat(text_index), torch.tensor(time_index), torch.cat(patch_index)
    order = torch.empty(start, dtype=torch.int64)
    order[texts] = torch.arange(len(texts))
    order[times] = len(texts) + torch.arange(
        len(times)
    )  # the time embedding replaces the row at <|tms_token|>
    order[patches] = len(texts) + len(times) + torch.arange(len(patches))
    return Layout(
        segments=tuple(segments),
        positions=torch.cat(positions, dim=1),
        text_index=texts,
        time_index=times,
        patch_index=patches,
        order=order,
        groups=tuple(Group(text, torch.stack(runs)) for (text, _), runs in members.items()),
    )
