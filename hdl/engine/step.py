"""A training step, taken without waiting for the GPU more than is needed.

Everything is queued as early as it can be:

    forward -> what the step measures starts towards the host -> backward -> the optimizer -> the norm starts

The host waits for the first of the two while backward runs, so it can look at the loss before the
optimizer steps and has queued the optimizer long before backward ends. The norm it may read whenever it
likes: best when the next step's backward has been queued.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.engine.processes import Processes
from hdl.errors import ran_out_of_memory
from hdl.flow.noise import Variant
from hdl.flow.perceptual import Perceptual
from hdl.flow.step import base_prediction, flow_matching_loss
from hdl.memory.lockstep import Lockstep
from hdl.o1.visual import VisualTower
from hdl.report.curves import band_sums
from hdl.seeds import derive_seed, seeded
from hdl.transfer import Reading, send

T = TypeVar("T")
Base = Callable[[], AbstractContextManager[Callable[..., Tensor]]]  # the model, with its adapter off inside


class Engine(Protocol):
    """What is used of DeepSpeed's engine: step() after every backward, which updates after a step's last."""

    __call__: Callable[..., Tensor]

    def backward(self, loss: Tensor) -> object: ...

    def step(self) -> object: ...

    def get_global_grad_norm(self) -> Tensor | float | None: ...


@dataclass(frozen=True)
class Measured:
    """What a step says of itself, summed over micro-batches and ranks."""

    loss: float
    tokens: int
    concerned: int  # ranks that want the run to be looked at after this step
    bands: Tensor  # from band_sums, of samples that are held against their pictures
    kept: float | None  # mean error of those held against the base's prediction

    @classmethod
    def read(cls, reading: Reading) -> "Measured":
        """Waits for a `forward_backward`'s numbers."""
        values = reading.wait()
        loss, tokens, concerned, error, kept = values[:5].tolist()
        return cls(loss, int(tokens), int(concerned), values[5:].view(2, -1), error / kept if kept else None)


class TrainStep:
    """An engine's steps: `forward_backward` and, if its numbers are to be trained on, `update`."""

    def __init__(
        self, engine: Engine, processes: Processes,
        *, variant: Variant, flow: Flow, seed: int, dropout: float, dtype: torch.dtype, fused: bool,
        ease: Callable[[str, bool], None] | None = None, concern: Callable[[], bool] = lambda: False,
        tower: VisualTower | None = None, lockstep: Lockstep | None = None, base: Base | None = None,
        perceptual: Perceptual | None = None,
    ) -> None:  # fmt: skip
        """variant, flow, seed, dtype, fused, tower, perceptual: as flow_matching_loss takes them; dropout: the adapter's. ease:
        called when a micro-batch ran out of memory, with what the allocator said and whether the micro-batch can be
        tried again, which it is when this returns. concern: whether this rank wants the run to be looked at after the step; all
        ranks learn of it with the step's numbers. lockstep: with which the model's passes are taken. base: predicts without the
        adapter, where batches have kept samples."""
        self.engine, self.processes = engine, processes
        self.variant, self.flow, self.seed = variant, flow, seed
        self.dropout, self.dtype, self.fused = dropout, dtype, fused
        self.ease, self.concern, self.tower = ease, concern, tower
        self.lockstep, self.base, self.perceptual = lockstep or Lockstep(), base, perceptual

    def forward_backward(self, step: int, batches: Sequence[Batch], sigmas: Tensor) -> Reading:
        """Queue a step's gradient; its numbers, for `Measured.read`, arrive when its forward passes are done.

        batches: this rank's micro-batches, in host memory; sigmas: float32 [global batch].
        """
        told = _Told(self.processes, len(batches))
        with self._own_dropout(step):
            for i, batch in enumerate(batches):
                toward = None
                if batch.base is not None:
                    toward = self._with_room(partial(self._ask_base, step, batch.base, sigmas))
                self._with_room(partial(self._queue_gradient, step, i, batch, sigmas, toward, told))
                if i < len(batches) - 1:
                    self.engine.step()
        assert told.reading, "a step has a micro-batch"
        return told.reading

    def _with_room(self, passes: Callable[[], T]) -> T:
        """What `passes` returns; where they run out of memory, eased, once more.

        A gradient reaches the engine at the very end of a backward pass: one that does not get there leaves
        nothing behind, and when memory is eased nothing of it is alive. Once it is there, the pass is not taken again.
        """
        while True:
            try:
                return passes()
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                lacking, again = str(error) or "out of memory", self.lockstep.broke_off()
            if self.ease is None:
                raise torch.OutOfMemoryError(lacking)
            self.ease(lacking, again)

    def _ask_base(self, step: int, batch: Batch, sigmas: Tensor) -> Tensor:
        """Queue the base's prediction for a micro-batch's kept samples. This pass is by itself and done before the
        adapter's, so that whichever runs out of memory is taken again without the other."""
        assert self.base, "kept samples need the base"
        self.lockstep.begin("forward only")
        with self.base() as model:
            predicted = base_prediction(
                model, batch.to(self.processes.device), sigmas, step,
                variant=self.variant, flow=self.flow, seed=self.seed, dtype=self.dtype, tower=self.tower,
            )  # fmt: skip
        self.lockstep.through("forward only")
        return predicted

    def _queue_gradient(
        self, step: int, i: int, batch: Batch, sigmas: Tensor, toward: Tensor | None, told: "_Told"
    ) -> None:
        """Queue the i-th micro-batch's gradient. toward: the base's prediction for its kept samples."""
        self.lockstep.begin()
        loss, errors = flow_matching_loss(
            self.engine, batch.to(self.processes.device), sigmas, step,
            variant=self.variant, flow=self.flow, seed=self.seed, fused=self.fused, dtype=self.dtype,
            tower=self.tower, toward=toward, perceptual=self.perceptual,
        )  # fmt: skip
        measured = _measured(loss, batch, sigmas, errors, i == 0 and self.concern())
        self.lockstep.through("forward")
        told.tell(i, measured)
        # DeepSpeed averages gradients over ranks and micro-batches; `loss` is a part of a sum.
        self.engine.backward(loss * (self.processes.world * told.count))

    def update(self) -> Reading:
        """Queue the optimizer, on the gradient of the last `forward_backward`; the gradient's norm, float64."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float64)
        return Reading(norm, self.processes.device)

    def _own_dropout(self, step: int) -> AbstractContextManager[None]:
        if not self.dropout:
            return nullcontext()  # nothing draws from torch's generators, and keeping them takes time
        return seeded(derive_seed(self.seed, "dropout", step, self.processes.rank))


class _Told:
    """What a step's micro-batches measured, told to the other ranks once all have: before the last one's
    backward, and once, however often it is tried."""

    def __init__(self, processes: Processes, count: int) -> None:
        self.processes, self.count = processes, count
        self.reading: Reading | None = None
        self._parts: dict[int, Tensor] = {}

    def tell(self, i: int, part: Tensor) -> None:
        self._parts[i] = part
        if len(self._parts) == self.count and self.reading is None:
            total = torch.stack(list(self._parts.values())).sum(dim=0)
            self.reading = Reading(self.processes.sum(total), self.processes.device)


def _measured(loss: Tensor, batch: Batch, sigmas: Tensor, errors: Tensor, concerned: bool) -> Tensor:
    """What adds up over micro-batches and ranks, in one float64 vector on the loss's device: loss, tokens, ranks
    concerned, error and number of kept samples, then band_sums of the others, flattened."""
    counted = send(torch.tensor([batch.layout.tokens, concerned], dtype=torch.float64), loss.device)
    kept = torch.tensor(batch.kept or [False] * len(batch.places))
    levels = sigmas[batch.places]
    sums = band_sums(levels, errors, ~kept)
    of_kept = band_sums(levels, errors, kept).sum(dim=1)
    return torch.cat([loss.detach().double().view(1), counted, of_kept, sums.flatten()])
