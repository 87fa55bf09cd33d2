"""A run's whole trained state in host memory: full master weights, moments and what else lies as they do (the average
of train.ema), copied while the host goes on.

DeepSpeed's accessors put one parameter together at a time, and wait for it: thousands of waits for the real
model's adapter. Here partitions (hdl/engine/partitions.py) are gathered and copied as they lie, in pieces, into
page-locked memory that is taken once; what a parameter's numbers are is only worked out there.

    ZeRO-1/2   the ranks' partitions, one after another, are all parameters, one after another
    ZeRO-3     every partition has a part of each parameter: the ranks' parts, one after another, are the parameter
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hdl.adapter.flat import by_name, trained_parameters
from hdl.engine.partitions import MOMENTS, flat_partitions, is_zero3, states, under_adams_names
from hdl.errors import HdlError
from hdl.transfer import Mark

WEIGHT = "weight"
KINDS = (WEIGHT, *MOMENTS)
PIECE = 2**24  # numbers that are gathered at a time: 64 MiB more on a GPU


@dataclass(frozen=True)
class Place:
    """Where a parameter's numbers are. start: in the ranks' partitions one after another, or, where each of them
    has a part of so many numbers, in every partition."""

    group: int
    start: int
    part: int | None
    shape: torch.Size

    def of(self, held: Sequence[Tensor]) -> Tensor:
        """The parameter, from groups of [world, length of a partition]; a view where it lies in one run."""
        numbers, n = held[self.group], self.shape.numel()
        if self.part is None:
            return numbers.view(-1)[self.start : self.start + n].view(self.shape)
        return numbers[:, self.start : self.start + self.part].reshape(-1)[:n].view(self.shape)

    def put(self, value: Tensor, partitions: Sequence[Tensor], rank: int) -> None:
        """Write what the rank's partition has of the parameter."""
        mine, value = partitions[self.group].view(-1), value.flatten()
        if self.part is None:
            first = rank * len(mine)
            start, stop = max(self.start, first), min(self.start + len(value), first + len(mine))
            if start < stop:
                mine[start - first : stop - first] = value[start - self.start : stop - self.start].to(
                    mine.device
                )
        else:
            value = value[rank * self.part : (rank + 1) * self.part]  # the last may be short: it is padded
            mine[self.start : self.start + len(value)] = value.to(mine.device)


class FullState:
    """Float32 master weights and moments of a run, as they were at the last `refill`."""

    def __init__(
        self, engine: DeepSpeedEngine, holds: bool, beside: Mapping[str, Sequence[Tensor]] | None = None
    ) -> None:
        """holds: whether this process's host memory is to hold them; the other ranks only take part. beside: other
        kinds of numbers, a tensor beside each of this rank's partitions, held like these.

        HdlError when there is not that much memory.
        """
        self.engine, self.holds, self.beside = engine, holds, dict(beside or {})
        self.kinds = (*KINDS, *self.beside)
        self.world = dist.get_world_size(engine.optimizer.dp_process_group)
        self._held: dict[str, list[Tensor]] = {}  # per kind and group: [world, length of a partition]
        self._places = places(engine)
        if holds:
            sizes = [(self.world, p.numel()) for p in flat_partitions(engine)]
            pinned = engine.device.type == "cuda"
            try:
                for kind in self.kinds:
                    self._held[kind] = [torch.empty(s, dtype=torch.float32, pin_memory=pinned) for s in sizes]
            except RuntimeError as error:
                needed = 4 * len(self.kinds) * sum(world * n for world, n in sizes)
                raise HdlError(
                    f"saving this adapter takes {needed / 2**30:.1f} GiB of{' page-locked' if pinned else ''} host "
                    f"memory, which rank 0 could not get ({str(error).splitlines()[0]}); free some, or lower lora.rank"
                ) from None

    @torch.no_grad()
    def refill(self) -> Mark:
        """Queue the copies of what is there now; they are complete at the mark. Every rank calls this.

        What was held before is overwritten.
        """
        with under_adams_names(self.engine):
            for kind in self.kinds:
                for group, mine in enumerate(self._partitions(kind)):
                    self._copy(mine.detach().view(-1), self._held[kind][group] if self.holds else None)
        return Mark(self.engine.device)

    def named(self, kind: str) -> dict[str, Tensor]:
        """What is held of a kind by parameter name (hdl.adapter.lora.adapter_parameters), as views where it lies
        in one run. To be read once the last refill's mark has been reached, and before the next."""
        trained = {name: place.of(self._held[kind]) for name, place in self._places.items()}
        return by_name(self.engine.module, trained)

    def _partitions(self, kind: str) -> Sequence[Tensor]:
        if kind == WEIGHT:
            return flat_partitions(self.engine)
        return self.beside.get(kind) or [state[kind] for state in states(self.engine)]

    def _copy(self, mine: Tensor, held: Tensor | None) -> None:
        length = max(1, PIECE // self.world)
        for start in range(0, len(mine), length):
            piece = mine[start : start + length]
            if self.world > 1:
                piece = piece.to(self.engine.device)
                everyone = piece.new_empty(self.world * len(piece))
                dist.all_gather_into_tensor(everyone, piece, group=self.engine.optimizer.dp_process_group)
                piece = everyone.view(self.world, -1)
            if held is not None:
                # Rank by rank: what is not one run of bytes PyTorch copies by way of memory that is not page-locked,
                # and waits for it.
                for theirs, row in zip(held, piece.view(self.world, -1)):
                    theirs[start : start + length].copy_(row, non_blocking=True)


def places(engine: DeepSpeedEngine) -> dict[str, Place]:
    """Of every trained parameter (hdl.adapter.flat.trained_parameters)."""
    zero = engine.optimizer
    trained = trained_parameters(engine.module)
    if is_zero3(engine):
        sharded: dict[str, Any] = dict(trained)  # DeepSpeed adds attributes to them
        found = {name: (zero.grad_position[zero.get_param_id(p)], p.ds_shape) for name, p in sharded.items()}
        return {n: Place(int(g), int(s), int(part), shape) for n, ((g, s, part), shape) in found.items()}
    # parameters are views of their group's flat copy in the training dtype: masters lie in the same order
    located = {}
    for name, parameter in trained.items():
        for group, flat in enumerate(zero.bit16_groups_flat):
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            if 0 <= start < flat.numel():
                located[name] = Place(group, start, None, parameter.shape)
        assert name in located, f"{name} is in no group of DeepSpeed's"
    return located
