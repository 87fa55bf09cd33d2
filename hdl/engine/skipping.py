"""Steps that are not taken: those whose loss or gradient is not finite, or whose loss is far above the last ones.

What has been computed of such a step is thrown away; weights, moments and the optimizer's own count of steps stay
what they were. The schedule, the data and the noise go on: they are functions of the step.

A loss is looked at before the optimizer is queued. A gradient's norm is known only once it has been: there the
update is held back where the gradient is, by DeepSpeed (ZeRO-3, float32, an optimizer in host memory) or on the
device (hdl/engine/clipping.py). The optimizers of bitsandbytes and the bfloat16 master have no such way: with
them a gradient that is not finite ends the run.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from hdl.config import Train
from hdl.engine.partitions import is_zero3

WINDOW = 50  # losses that a step's is compared with
FEWEST = 10  # before that many, no loss is a spike


def drop_gradient(engine: DeepSpeedEngine) -> None:
    """Take the engine's step without its gradient: as DeepSpeed does when float16 overflows."""
    zero = engine.optimizer

    def overflowed(*_: object, **__: object) -> None:
        zero.overflow = True

    if is_zero3(engine):
        patched: dict[str, object] = {"_overflow_check_and_loss_scale_update": overflowed}
    else:
        patched = {"check_grad_overflow": True, "check_overflow": overflowed}
    kept = {name: zero.__dict__[name] for name in patched if name in zero.__dict__}
    zero.__dict__.update(patched)
    try:
        engine.step()
    finally:
        for name in patched:
            del zero.__dict__[name]
        zero.__dict__.update(kept)
    keep_to_schedule(engine)


def keep_to_schedule(engine: DeepSpeedEngine) -> None:
    """DeepSpeed leaves the schedule where it is when it drops a step; here it is a function of the step."""
    if not engine.was_step_applied():
        engine.lr_scheduler.step()


def holds_back(engine: DeepSpeedEngine) -> bool:
    """Whether a gradient that is not finite changes nothing: see the top of this file."""
    zero = engine.optimizer
    checked = is_zero3(engine) or zero.dtype == torch.float32 or zero.check_grad_overflow
    return checked or hasattr(zero.optimizer, "found_inf")


class Skipping:
    """Which steps to skip, and what was skipped. The same on every rank, as it goes by what all ranks measured."""

    def __init__(self, train: Train, file: Path | None, state: dict[str, Any]) -> None:
        """file: rank 0's, what was skipped, a line of JSON each; state: of the checkpoint that the run goes on
        from, or empty. Lines of later steps are taken out: these steps come again."""
        self.train, self.file = train, file
        self.count = int(state.get("skipped", 0))
        self._losses: deque[float] = deque(state.get("losses", []), maxlen=WINDOW)
        if file and file.exists():
            lines = file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= state.get("step", 0)]
            file.write_text("".join(kept))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": self.count, "losses": list(self._losses)}

    def objection(self, loss: float) -> str | None:
        """What is wrong with this loss, for a step not to be taken; None, and it is remembered, when it is fine."""
        if not math.isfinite(loss):
            return f"is not finite ({loss})"
        if self.train.spike:
            usual = statistics.median(self._losses) if len(self._losses) >= FEWEST else math.inf
            if loss > self.train.spike * usual:
                return (
                    f"is {loss:.4g}, more than train.spike {self.train.spike:g} times {usual:.4g}, the median of the last "
                    f"{len(self._losses)}"
                )
            self._losses.append(loss)
        return None

    def may(self) -> bool:
        """Whether one more step may be skipped."""
        return self.count < self.train.max_skipped

    def record(self, step: int, why: str, samples: list[tuple[str, float]]) -> None:
        """Count a skipped step. samples: keys and sigmas, of all ranks."""
        self.count += 1
        if self.file:
            line = {"step": step, "why": why, "samples": [{"key": k, "sigma": s} for k, s in samples]}
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """Of a line of skipped.jsonl; infinite for one that was not written to its end."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("}\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def described(samples: list[tuple[str, float]]) -> str:
    return ", ".join(f"{key} at sigma {sigma:.4f}" for key, sigma in samples)
