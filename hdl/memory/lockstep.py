"""Ranks that fetch their weights from each other take every pass together, also the one that runs out of memory.

Where layers are shared out (hdl/memory/shares.py), a rank whose pass broke off would leave the others waiting for its
shares, and could not take its pass again alone. So at the end of each pass of a step, before anything else that
ranks do together (adding up what was measured, averaging gradients), they tell each other whether they got through:

    a rank that broke off     fetches what the rest of the pass fetches, says so, and takes the micro-batch again
    the others                stay with it: they fetch what it fetches, computing nothing, until all got through

It is hosts that talk here, while their GPUs are still at work.
"""

from typing import Literal, cast

import torch
import torch.distributed as dist

from hdl.memory.host import Ranks, machines
from hdl.memory.streaming import Streaming

Stage = Literal["forward", "backward", "forward only"]  # the last: a pass by itself, without gradient


class Lockstep:
    """Of a decoder's layers with those of the other ranks; without any it only knows how far a pass has come."""

    def __init__(self, streaming: Streaming | None = None, ranks: Ranks | None = None) -> None:
        """streaming: whose fetches need all ranks of a machine; ranks: the run's, which all come here."""
        self._streaming = streaming
        self._stage: Stage | None = None  # the pass that runs
        if streaming and ranks:
            groups, here = machines(ranks)
            self._group = [dist.new_group(members, backend="gloo") for members in groups][here]

    def begin(self, stage: Stage = "forward") -> None:
        """A micro-batch, or a pass by itself, is to come, or to come again."""
        self._enter(stage)

    def through(self, stage: Stage) -> None:
        """This rank is through its pass: returns when all are. Outside of `begin` and the end of backward nothing
        is asked."""
        if self._stage != stage:
            return
        if self._streaming:
            self._stay(stage)
        self._enter("backward" if stage == "forward" else None)

    def broke_off(self) -> bool:
        """This rank's pass broke off; whether it can be taken again, as the others will stay with it."""
        if self._stage is None:
            return False  # gradients are on their way to DeepSpeed and the others
        if self._streaming:
            self._streaming.finish(self._stage)
            self._some_rank(broke_off=True)
        return True

    def _enter(self, stage: Stage | None) -> None:
        self._stage = stage
        if self._streaming:
            self._streaming.begin()

    def _stay(self, stage: Stage) -> None:
        while self._some_rank(broke_off=False):
            self._accompany("forward" if stage == "backward" else stage)
            if stage == "backward":
                self._stay("forward")
                self._accompany("backward")

    def _accompany(self, stage: Stage) -> None:
        streaming = cast(Streaming, self._streaming)
        streaming.begin()
        streaming.finish(stage)

    def _some_rank(self, broke_off: bool) -> bool:
        """Whether any did; all ask."""
        told = torch.tensor([int(broke_off)])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return bool(told)
