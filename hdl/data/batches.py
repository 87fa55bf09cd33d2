"""From shards to packed batches: a rank's share of each step, read and packed ahead of time.

Which samples a step trains on is a pure function of its number, whatever the number of ranks (hdl/data/order.py,
hdl/data/steps.py), so a data position is nothing but a step.

A batch is packed: text tokens and patches of several samples in one run, without padding.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hdl.data.picks import Picks
from hdl.data.reading import Reader
from hdl.data.samples import Sample
from hdl.data.steps import Plan, Steps
from hdl.data.tally import Tally
from hdl.data.untriggered import Untriggered
from hdl.errors import HdlError
from hdl.o1.layout import Layout, Segment, lay_out
from hdl.o1.patches import unpatchify
from hdl.o1.visual import Eyes, Look

RECENT_LAYOUTS = 16
AHEAD_BYTES = 160 * 2**20  # of batches read ahead, if more than one step of them fits
MOST_STEPS_AHEAD = 8
READERS = 2  # threads
ASK_EVERY = 8  # steps, for the shards wanted next


@dataclass(frozen=True)
class Batch:
    """Several samples in one packed run: T text tokens, P patches, R reference patches, B samples."""

    keys: list[str]
    places: list[int]  # each sample's place in the global batch of its step
    text: Tensor  # bfloat16 [T, D]
    patches: Tensor  # uint8 [P, 3072]
    layout: Layout
    global_patches: int  # patches in the whole step, over all ranks and micro-batches
    weights: list[
        float
    ]  # each sample's factor in the loss; what the loss is divided by does not depend on it
    references: Tensor | None = None  # uint8 [R, 3072], clean, of those that are pairs; None: none is
    look: Look | None = None  # the same pictures, for the visual tower
    kept: tuple[bool, ...] = ()  # of each sample, whether the base's prediction is its target; (): of none
    base: "Batch | None" = None  # what the base is to predict first: the kept samples, by themselves

    @property
    def patch_counts(self) -> list[int]:
        return [segment.patches for segment in self.layout.segments]

    @property
    def nbytes(self) -> int:
        """About."""
        shown = (self.references, self.look.pixels) if self.look else ()
        return sum(part.nbytes for part in (self.text, self.patches, *shown) if part is not None)

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            text=self.text.to(device, non_blocking=True),
            patches=self.patches.to(device, non_blocking=True),
            layout=_layout_on(torch.device(device), self.layout),
            references=None if self.references is None else self.references.to(device, non_blocking=True),
            look=self.look and self.look.to(device),
            base=self.base and self.base.to(device),
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


def pack(
    samples: Sequence[Sample], places: list[int], global_patches: int,
    weights: list[float] | None = None, pin: bool = False, eyes: Eyes | None = None,
) -> Batch:  # fmt: skip
    """Put samples one after another. weights: 1 each by default; pin: in page-locked memory, from which copying to
    a GPU does not wait; eyes: of the base, needed where a sample is a pair."""
    layout = lay_out(
        [
            Segment(len(s.input_ids), s.rows, s.cols, tuple(grid for grid, _ in s.references), s.seen)
            for s in samples
        ]
    )
    references = [patches for s in samples for _, patches in s.references]
    look = _look(samples, eyes) if references else None
    return Batch(
        keys=[s.key for s in samples],
        places=places,
        text=_joined([s.text_embeds for s in samples], pin),
        patches=_joined([s.patches for s in samples], pin),
        layout=layout.pinned() if pin else layout,
        global_patches=global_patches,
        weights=weights or [1.0] * len(samples),
        references=_joined(references, pin) if references else None,
        look=look.pinned() if look and pin else look,
    )


def _look(samples: Sequence[Sample], eyes: Eyes | None) -> Look:
    """Of the references of all samples."""
    assert eyes, "pairs are packed with the eyes of their base"
    looks = []
    for sample in samples:
        if sample.references:
            images = [
                Image.fromarray(unpatchify(patches, *grid).numpy()) for grid, patches in sample.references
            ]
            looks.append(eyes.look(images))
            if eyes.grids(looks[-1]) != [(seen.rows, seen.cols) for seen in sample.seen]:
                raise HdlError(
                    f"sample {sample.key}: the base's image processor makes {eyes.grids(looks[-1])} tokens of its "
                    f"references, its prompts have room for {[(s.rows, s.cols) for s in sample.seen]}: the base's "
                    "preprocessor_config.json has changed since; prepare the images again"
                )
    return Look.joined(looks)


def _joined(parts: Sequence[Tensor], pin: bool) -> Tensor:
    rows = sum(len(part) for part in parts)
    out = torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=pin)
    for part, place in zip(parts, out.split([len(part) for part in parts])):
        place.copy_(part)
    return out


@dataclass(frozen=True)
class Keeping:
    """How kept draws are asked for and counted. weight: factor of their loss; together: whether ranks can only make
    forward passes together, so that one without kept draws has the base predict something, too; as_cut: whether their
    texts may be no longer than the captions that packs were cut for."""

    untriggered: Untriggered
    weight: float
    together: bool
    as_cut: bool = False

    def reworded(self, samples: Sequence[Sample], picks: Picks) -> list[Sample]:
        rooms = (picks.tokens - picks.patches).tolist() if self.as_cut else [None] * len(samples)
        return [
            self.untriggered.reword(sample, number, room) if kept else sample
            for sample, kept, number, room in zip(samples, picks.kept, picks.number.tolist(), rooms)
        ]

    def for_base(self, plan: Plan, rank: int, number: int) -> list[int]:
        """Of a rank's micro-batch, the samples that the base is to predict."""
        mine = np.flatnonzero(plan.packs[number].kept).tolist()
        if mine or not self.together:
            return mine
        turn = plan.dealt[rank].index(number)
        return [0] if any(plan.packs[numbers[turn]].kept.any() for numbers in plan.dealt) else []


class Batches:
    """This rank's packed micro-batches of any step; those of the next steps are read ahead.

    waited: seconds that the last `of_step` took. tally: what the steps asked for have drawn, over all ranks.
    """

    def __init__(
        self, steps: Steps, reader: Reader, rank: int, pin_memory: bool, eyes: Eyes | None = None,
        *, keeping: "Keeping | None" = None,
    ) -> None:  # fmt: skip
        """eyes: as `pack` takes them; keeping: where draws are kept."""
        self.keeping = keeping
        self.eyes = eyes
        self.steps, self.reader, self.rank, self.pin_memory = steps, reader, rank, pin_memory
        self.mixture = reader.mixture
        self.tally = Tally(self.mixture)
        self.waited = 0.0
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
        self._coming: dict[int, Future[list[Future[Batch]]]] = {}
        self._ahead = 1  # steps
        self._asked: dict[int, list[str]] = {}

    def of_step(self, step: int) -> list[Batch]:
        """The step's micro-batches, on the CPU; HdlError when a sample can neither be read nor be replaced."""
        begin = time.perf_counter()
        wanted = range(step, step + self._ahead + 1)
        for other in [s for s in self._coming if s not in wanted]:
            self._coming.pop(other).cancel()
        for s in wanted:
            if s not in self._coming:
                self._coming[s] = self._planner.submit(self._start, s)
        batches = [batch.result() for batch in self._coming.pop(step).result()]
        size = sum(batch.nbytes for batch in batches)
        self._ahead = min(max(AHEAD_BYTES // size, 1), MOST_STEPS_AHEAD)
        for pack in self.steps.plan(step).packs:
            self.tally.add(pack.sample)
        self.waited = time.perf_counter() - begin
        return batches

    def close(self) -> None:
        self._planner.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def _start(self, step: int) -> list[Future[Batch]]:
        """Have the step's micro-batches read."""
        if step % ASK_EVERY == 0 or not self._asked:
            self._prefetch(step)
        plan = self.steps.plan(step)
        return [self._readers.submit(self._read, step, number) for number in plan.dealt[self.rank]]

    def _read(self, step: int, number: int) -> Batch:
        plan = self.steps.plan(step)
        picks, places = plan.packs[number], plan.places(number)
        weights = self.mixture.loss_weight[picks.sample].tolist()
        samples = self.reader.read(picks)
        for_base = []
        if self.keeping:
            samples = self.keeping.reworded(samples, picks)
            weights = [w * self.keeping.weight if kept else w for w, kept in zip(weights, picks.kept)]
            for_base = self.keeping.for_base(plan, self.rank, number)
        batch = pack(samples, places, plan.patches, weights, self.pin_memory, self.eyes)
        if not for_base:
            return batch
        base = pack(
            [samples[i] for i in for_base], [places[i] for i in for_base], plan.patches, None, self.pin_memory,
            self.eyes,
        )  # fmt: skip
        return replace(batch, kept=tuple(picks.kept.tolist()), base=base)

    def _prefetch(self, step: int) -> None:
        """Tell the sources which shards are wanted next: twice as many as are mixed."""
        shards, window = len(self.mixture.columns.shards), self.steps.cut.draws.window
        wanted = min(2 * window, shards) if window else shards
        needed = self.steps.shards_needed(step, self.rank, wanted)
        if needed != self._asked:
            for source, names in needed.items():
                self.mixture.sources[source].shards.prefetch(names)
        self._asked = needed
