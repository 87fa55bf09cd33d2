"""Decoder layers whose frozen weights are shared out over the GPUs of a machine, an equal part of every layer on each.

A share is a range of bytes of the layer's block (hdl/memory/streaming.py), whatever it holds, so every form of weights
can be shared, and a block that has been brought together is the block that was taken apart, to the bit. That is
one all-gather a layer, into the slot, on a communicator of its own, whose stream has priority: so it begins as soon as the slot
is free, beside the products of the layer before, and never waits for what the optimizer sends.

Bringing the weights in, each rank reads whole layers, every so many-th, into the slot that it has anyway, and
then sends everybody's share of it out: a machine reads its checkpoint once, and no rank ever holds more of it.
e4m3's scales depend on all rows of a matrix, so a rank that had read rows alone could not have made the same ones.

Sharing is within a machine: over a network the same gathers would take longer than the step (docs/scaling.md).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hdl.memory.host import Ranks, machines
from hdl.memory.streaming import ALIGNMENT, Arrival

# Under its new name where PyTorch has it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class ShareStore:
    """This rank's shares of all blocks. Other ranks have to fetch the same at the same time (hdl/memory/lockstep.py)."""

    # Ranks capture at different times, and NCCL may want to talk to the others when a gather is captured.
    in_graphs = False
    together = True

    def __init__(self, size: int, count: int, device: torch.device, ranks: Ranks) -> None:
        """size: of a block, count: blocks. ValueError where torch.distributed has not been initialized."""
        groups, here = machines(ranks)
        members = groups[here]
        self._group = _groups(groups, device)[here]
        self._rank, self._world, self._count = members.index(dist.get_rank()), len(members), count
        share = -(-size // (self._world * ALIGNMENT)) * ALIGNMENT
        self.slot = self._world * share
        self.blocks = torch.empty(count * share, dtype=torch.uint8, device=device).split(share)
        self._filled: Tensor | None = None  # the slot with this rank's layer of the round

    def mover(self, device: torch.device, slots: Sequence[Tensor]) -> "Gatherer":
        return Gatherer(self._group)

    def mine(self, j: int) -> bool:
        return j % self._world == self._rank

    def put(self, j: int, slot: Tensor) -> None:
        if self.mine(j):
            self._filled = slot
        if j % self._world == self._world - 1 or j == self._count - 1:
            # Who has no layer in the last round sends what nobody reads.
            self._exchange(range(j - j % self._world, j + 1), slot if self._filled is None else self._filled)
            self._filled = None

    def _exchange(self, layers: range, filled: Tensor) -> None:
        """The i-th rank's filled slot holds layers[i]: give everyone their share of it."""
        received = torch.empty_like(filled)
        dist.all_to_all_single(received, filled, group=self._group)
        for j, share in zip(layers, received.chunk(self._world)):
            self.blocks[j].copy_(share)

    def whole(self, j: int, slot: Tensor) -> Tensor:
        Gatherer(self._group).copy(slot, self.blocks[j]).wait()
        return slot


class Gatherer:
    """Brings shares together; the communicator's stream goes on when all that is queued on the current one is done."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def copy(self, slot: Tensor, share: Tensor) -> Arrival:
        return cast(Arrival, _all_gather(slot, share, group=self._group, async_op=True))


def _groups(members: Sequence[Sequence[int]], device: torch.device) -> list[dist.ProcessGroup]:
    """One for each; all ranks make all of them."""
    options: dict[str, Any] = {}
    if device.type == "cuda":
        options["pg_options"] = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    return [cast(dist.ProcessGroup, dist.new_group(list(ranks), **options)) for ranks in members]
