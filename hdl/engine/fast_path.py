"""Which path a run's decoder takes, fused or plain, and saying so once."""

import torch
from peft import PeftModel

from hdl.config import Run
from hdl.engine.processes import Processes
from hdl.engine.sharding import read_strategy
from hdl.errors import HdlError
from hdl.kernels.fuse import cannot_fuse, flatten, fuse, supports_fp8
from hdl.memory.absent import bring_in
from hdl.memory.recompute import recompute_every_layer


def may_fuse(run: Run, device: torch.device) -> bool:
    """Whether a model of this run could take the fast path, as far as can be told before it is loaded; its
    weights can then be left in the checkpoint until they are packed. HdlError for what needs a GPU."""
    if run.model.weights == "nf4" and device.type != "cuda":
        raise HdlError(
            "model.weights nf4 needs a CUDA GPU, this run is on the CPU; use model.weights full or fp8_once"
        )
    return _plain_because(run, device) is None


class FastPath:
    """Decided before DeepSpeed takes the model (`prepare`), applied after (`apply`)."""

    def __init__(self, run: Run, adapted: PeftModel, processes: Processes) -> None:
        """HdlError when the run asks for what this model or machine cannot do."""
        self.settings = run.model
        self.model = adapted
        self.weights: str = run.model.weights
        reason = _plain_because(run, processes.device) or cannot_fuse(adapted)
        if reason and self.settings.kernels == "fused":
            raise HdlError(f"model.kernels fused: {reason}; use model.kernels auto")
        if reason and self.weights != "full":
            raise HdlError(
                f"model.weights {self.weights} needs the fused path, but {reason}; use model.weights full"
            )
        self.fused = reason is None
        notes = [f"plain kernels: {reason}"] if reason and self.settings.kernels == "auto" else []
        if self.weights.startswith("fp8") and not supports_fp8(processes.device):
            self.weights = "fp8_stored"
            notes.append(
                "this GPU has no fp8 arithmetic (Ada and newer do): e4m3 weights are only kept, not multiplied in"
            )
        if not self.fused and self.settings.keep not in ("everything", "input"):
            notes.append('plain kernels keep all or nothing: model.keep "input" is used')
        if processes.is_main and notes:
            print("; ".join(notes))

    def prepare(self) -> None:
        if self.fused:
            flatten(self.model)
            return
        bring_in(self.model)
        if self.settings.keep != "everything":
            recompute_every_layer(self.model.get_base_model())  # type: ignore[arg-type]

    def apply(self) -> None:
        if self.fused:
            keep = self.settings.keep
            fuse(self.model, weights=self.weights, keep=keep if isinstance(keep, str) else list(keep))


def _plain_because(run: Run, device: torch.device) -> str | None:
    if run.model.kernels == "plain":
        return "model.kernels is plain"
    if run.model.kernels == "auto" and device.type == "cpu" and run.model.weights == "full":
        return "a CPU gains nothing from fused ones"
    if read_strategy(run.train.deepspeed)["zero_optimization"]["stage"] == 3:
        return "ZeRO-3 shards the frozen weights"
    return None
