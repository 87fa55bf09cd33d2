"""Which path a run's decoder takes, fused or plain, and saying so once."""

import torch
from peft import PeftModel

from hdl.config import Run
from hdl.engine.processes import Processes
from hdl.engine.sharding import read_strategy
from hdl.errors import HdlError
from hdl.kernels.fuse import cannot_fuse, flatten, fuse, supports_fp8
from hdl.memory.recompute import recompute_every_layer


class FastPath:
    """Decided before DeepSpeed takes the model (`prepare`), applied after (`apply`)."""

    def __init__(self, run: Run, adapted: PeftModel, processes: Processes) -> None:
        """HdlError when the run asks for what this model or machine cannot do."""
        self.settings = run.model
        self.model = adapted
        reason = _plain_because(run, adapted, processes.device)
        if reason and self.settings.kernels == "fused":
            raise HdlError(f"model.kernels fused: {reason}; use model.kernels auto")
        if reason and self.settings.weights == "fp8":
            raise HdlError(f"model.weights fp8 needs the fused path, but {reason}; use model.weights full")
        self.fused = reason is None
        self.fp8 = self.settings.weights == "fp8" and supports_fp8(processes.device)
        notes = [f"plain kernels: {reason}"] if reason and self.settings.kernels == "auto" else []
        if self.settings.weights == "fp8" and not self.fp8:
            notes.append("this GPU has no fp8 arithmetic (Ada and newer do): weights stay as they are")
        if not self.fused and self.settings.keep not in ("everything", "input"):
            notes.append('plain kernels keep all or nothing: model.keep "input" is used')
        if processes.is_main and notes:
            print("; ".join(notes))

    def prepare(self) -> None:
        if self.fused:
            flatten(self.model)
        elif self.settings.keep != "everything":
            recompute_every_layer(self.model.get_base_model())  # type: ignore[arg-type]

    def apply(self) -> None:
        if self.fused:
            keep = self.settings.keep
            fuse(self.model, fp8=self.fp8, keep=keep if isinstance(keep, str) else list(keep))


def _plain_because(run: Run, adapted: PeftModel, device: torch.device) -> str | None:
    if run.model.kernels == "plain":
        return "model.kernels is plain"
    if run.model.kernels == "auto" and device.type == "cpu" and run.model.weights == "full":
        return "a CPU gains nothing from fused ones"
    if read_strategy(run.train.deepspeed)["zero_optimization"]["stage"] == 3:
        return "ZeRO-3 shards the frozen weights"
    return cannot_fuse(adapted)
