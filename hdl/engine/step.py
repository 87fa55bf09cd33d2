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
from typing import Protocol

import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.engine.processes import Processes
from hdl.flow.noise import Variant
from hdl.flow.step import flow_matching_loss
from hdl.memory.lockstep import Lockstep
from hdl.o1.visual import VisualTower
from hdl.report.curves import band_sums
from hdl.seeds import derive_seed, seeded
from hdl.transfer import Reading, send


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
    bands: Tensor  # from band_sums

    @classmethod
    def read(cls, reading: Reading) -> "Measured":
        """Waits for a `forward_backward`'s numbers."""
        values = reading.wait()
        return cls(float(values[0]), int(values[1]), int(values[2]), values[3:].view(2, -1))


class TrainStep:
    """An engine's steps: `forward_backward` and, if its numbers are to be trained on, `update`."""

    def __init__(
        self, engine: Engine, processes: Processes,
        *, variant: Variant, flow: Flow, seed: int, dropout: float, dtype: torch.dtype, fused: bool,
        ease: Callable[[str], None] | None = None, concern: Callable[[], bool] = lambda: False,
        tower: VisualTower | None = None, lockstep: Lockstep | None = None,
    ) -> None:  # fmt: skip
        """variant, flow, seed, dtype, fused, tower: as flow_matching_loss takes them; dropout: the adapter's. ease:
        called when a micro-batch ran out of memory, with what the allocator said; when it returns, the
        micro-batch is tried again. concern: whether this rank wants the run to be looked at after the step; all
        ranks learn of it with the step's numbers. lockstep: with which the model's passes are taken."""
        self.engine, self.processes = engine, processes
        self.variant, self.flow, self.seed = variant, flow, seed
        self.dropout, self.dtype, self.fused = dropout, dtype, fused
        self.ease, self.concern, self.tower = ease, concern, tower
        self.lockstep = lockstep or Lockstep()

    def forward_backward(self, step: int, batches: Sequence[Batch], sigmas: Tensor) -> Reading:
        """Queue a step's gradient; its numbers, for `Measured.read`, arrive when its forward passes are done.

        batches: this rank's micro-batches, in host memory; sigmas: float32 [global batch].
        """
        told = _Told(self.processes, len(batches))
        with self._own_dropout(step):
            for i, batch in enumerate(batches):
                while lacking := self._attempt(step, i, batch, sigmas, told):
                    if self.ease is None:
                        raise torch.OutOfMemoryError(lacking)
                    self.ease(lacking)
                if i < len(batches) - 1:
                    self.engine.step()
        assert told.reading, "a step has a micro-batch"
        return told.reading

    def _attempt(self, step: int, i: int, batch: Batch, sigmas: Tensor, told: "_Told") -> str | None:
        """Queue the i-th micro-batch's gradient, or say what memory it lacked.

        A gradient reaches the engine at the very end of a backward pass: one that does not get there leaves
        nothing behind, and on return nothing of it is alive.
        """
        self.lockstep.begin()
        try:
            loss, errors = flow_matching_loss(
                self.engine, batch.to(self.processes.device), sigmas, step,
                variant=self.variant, flow=self.flow, seed=self.seed, fused=self.fused, dtype=self.dtype,
                tower=self.tower,
            )  # fmt: skip
            measured = _measured(loss, batch, sigmas, errors, i == 0 and self.concern())
            self.lockstep.through("forward")
            told.tell(i, measured)
            # DeepSpeed averages gradients over ranks and micro-batches; `loss` is a part of a sum.
            self.engine.backward(loss * (self.processes.world * told.count))
        except torch.OutOfMemoryError as error:
            if not self.lockstep.broke_off():
                raise
            return str(error) or "out of memory"
        return None

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
    concerned, then band_sums, flattened."""
    counted = send(torch.tensor([batch.layout.tokens, concerned], dtype=torch.float64), loss.device)
    sums = band_sums(sigmas[batch.places], errors)
    return torch.cat([loss.detach().double().view(1), counted, sums.flatten()])
