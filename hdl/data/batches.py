"""From shards to packed batches: which samples a step trains on, and how a rank's share is packed.

The data is one endless stream: every epoch is a permutation of all samples drawn from (seed, epoch), one
epoch after another. Step k trains on places k*B .. k*B + B - 1 of the stream, whatever the number of
ranks; rank r of W takes the r-th of W equal parts. So a step's batch is a pure function of its number,
and a data position is nothing but a step.

A batch is packed: text tokens and patches of several samples in one run, without padding.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hdl.data.samples import Sample
from hdl.data.shards import Shards
from hdl.o1.layout import Layout, Segment, lay_out
from hdl.seeds import generator_for

RECENT_LAYOUTS = 16


@dataclass(frozen=True)
class Batch:
    """Several samples in one packed run: T text tokens, P patches, B samples."""

    keys: list[str]
    places: list[int]  # each sample's place in the global batch of its step
    text: Tensor  # bfloat16 [T, D]
    patches: Tensor  # uint8 [P, 3072]
    layout: Layout
    global_patches: int  # patches in the whole step, over all ranks and micro-batches

    @property
    def patch_counts(self) -> list[int]:
        return [segment.patches for segment in self.layout.segments]

    def pinned(self) -> "Batch":
        """In page-locked memory, from which copying to a GPU does not wait."""
        return replace(
            self,
            text=self.text.pin_memory(),
            patches=self.patches.pin_memory(),
            layout=self.layout.pinned(),
        )

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            text=self.text.to(device, non_blocking=True),
            patches=self.patches.to(device, non_blocking=True),
            layout=_layout_on(torch.device(device), self.layout),
        )


_recent_layouts: OrderedDict[tuple[torch.device, tuple[Segment, ...]], Layout] = OrderedDict()


def _layout_on(device: torch.device, layout: Layout) -> Layout:
    """The layout's copy on the device. A layout is all in its segments, and many come again: the last
    RECENT_LAYOUTS copies are kept."""
    key = (device, layout.segments)
    if key not in _recent_layouts:
        _recent_layouts[key] = layout.to(device)
    _recent_layouts.move_to_end(key)
    while len(_recent_layouts) > RECENT_LAYOUTS:
        _recent_layouts.popitem(last=False)
    return _recent_layouts[key]


def samples_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices (into `count` samples) of a step's global batch, in the order of their places."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch(count, seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=4)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator_for(seed, "epoch", epoch)).tolist()


def pack(samples: list[Sample], places: list[int], global_patches: int) -> Batch:
    """Put samples one after another."""
    return Batch(
        keys=[s.key for s in samples],
        places=places,
        text=torch.cat([s.text_embeds for s in samples]),
        patches=torch.cat([s.patches for s in samples]),
        layout=lay_out([Segment(len(s.input_ids), s.rows, s.cols) for s in samples]),
        global_patches=global_patches,
    )


class Batches:
    """This rank's packed micro-batches of any step; the next step's are read ahead in a thread."""

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        seed: int,
        caption_dropout: float,
        pin_memory: bool,
    ) -> None:
        self.shards = shards
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world = rank, world
        self.seed, self.caption_dropout = seed, caption_dropout
        self.pin_memory = pin_memory
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def of_step(self, step: int) -> list[Batch]:
        """The step's micro-batches, on the CPU; HdlError when a sample cannot be read."""
        ready = self._ahead.pop(step, None)
        batches = ready.result() if ready else self._read(step)
        self._ahead = {step + 1: self._reader.submit(self._read, step + 1)}
        return batches

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> list[Batch]:
        indices = samples_of_step(len(self.shards.infos), self.batch_size, self.seed, step)
        patches = sum(self.shards.infos[i].rows * self.shards.infos[i].cols for i in indices)
        dropped = torch.rand(self.batch_size, generator=generator_for(self.seed, "caption dropout", step))
        share = self.batch_size // self.world
        batches = []
        for start in range(self.rank * share, (self.rank + 1) * share, self.micro_batch_size):
            places = list(range(start, start + self.micro_batch_size))
            samples = [self._sample(indices[p], bool(dropped[p] < self.caption_dropout)) for p in places]
            batch = pack(samples, places, patches)
            batches.append(batch.pinned() if self.pin_memory else batch)
        return batches

    def _sample(self, index: int, without_caption: bool) -> Sample:
        sample = self.shards.read(index)
        if without_caption:
            empty = self.shards.empty
            sample = replace(sample, input_ids=empty.input_ids, text_embeds=empty.text_embeds)
        return sample
