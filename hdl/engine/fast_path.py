"""Which path a run's decoder takes, fused or plain, and saying so once."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from hdl.config import Run
from hdl.engine.processes import Processes
from hdl.engine.sharding import divides_weights
from hdl.errors import HdlError
from hdl.kernels.fuse import (
    cannot_fuse,
    flatten,
    fuse,
    keep_less,
    lockstep_of,
    streamed_bytes,
    supports_fp8,
)
from hdl.memory.absent import bring_in
from hdl.memory.cache import FORMS, WeightCache, made_with
from hdl.memory.host import GIB, available, machines
from hdl.memory.lockstep import Lockstep
from hdl.memory.recompute import recompute_every_layer
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.config import O1Config


def may_fuse(run: Run, device: torch.device) -> bool:
    """Whether a model of this run could take the fast path, as far as can be told before it is loaded; its
    weights can then be left in the checkpoint until they are packed. HdlError for what needs a GPU or that path."""
    if run.model.weights == "nf4" and device.type != "cuda":
        raise HdlError(
            "model.weights nf4 needs a CUDA GPU, this run is on the CPU; use model.weights full or fp8_once"
        )
    if run.model.offload and device.type != "cuda":
        raise HdlError(
            f"model.offload {run.model.offload} moves activations off a CUDA GPU, this run is on the CPU; leave it out"
        )
    if run.model.cache:
        _check_cache(run.model.cache)
    reason = _plain_because(run, device)
    if reason:
        _refuse_plain(run, reason)
    return reason is None


def _check_cache(folder: Path) -> None:
    """HdlError when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise HdlError(f"model.cache {folder}: cannot be written to ({error}); give another folder") from None


def check_layers(run: Run, config: O1Config) -> None:
    """HdlError when the model has not as many layers as the run's options speak of."""
    layers, keep = config.num_hidden_layers, run.model.keep
    if run.model.stream > layers:
        raise HdlError(
            f"model.stream {run.model.stream}: the model has {layers} layers; stream at most that many"
        )
    if run.model.offload > layers:
        raise HdlError(
            f"model.offload {run.model.offload}: the model has {layers} layers; offload at most that many"
        )
    if run.model.shard > layers:
        raise HdlError(
            f"model.shard {run.model.shard}: the model has {layers} layers; shard at most that many"
        )
    if not isinstance(keep, str) and len(keep) != layers:
        raise HdlError(f"model.keep has {len(keep)} words, the model {layers} layers; give one word for each")


def check_stream(run: Run, config: O1Config, dtype: torch.dtype) -> None:
    """HdlError when the model has not as many layers as are to be streamed, or this machine not the memory."""
    check_layers(run, config)
    stream = run.model.stream
    if not stream:
        return
    needed = stream * streamed_bytes(config, run.model.weights, dtype)
    found, where = available()
    if needed > found:
        raise HdlError(
            f"model.stream {stream} keeps {needed / GIB:.1f} GiB of weights in host memory, of which {found / GIB:.1f} "
            f"GiB are available ({where}); stream at most {int(stream * found / needed)} layers, or use a "
            "smaller form (model.weights)"
        )


def check_shard(run: Run, processes: Processes) -> None:
    """HdlError on every rank when weights are to be shared out and a machine has one process to hold them."""
    if run.model.shard and any(len(members) == 1 for members in machines(processes)[0]):
        raise HdlError(
            f"model.shard {run.model.shard} shares weights out over the processes of a machine, and a machine of this "
            "run has one; start several on each (torchrun --nproc_per_node, one a GPU), or leave it out",
            on_all_ranks=True,
        )


class FastPath:
    """Decided before DeepSpeed takes the model (`prepare`), applied after (`apply`)."""

    def __init__(self, run: Run, adapted: PeftModel, processes: Processes) -> None:
        """HdlError when the run asks for what this model or machine cannot do."""
        self.settings = run.model
        self.model = adapted
        self.processes = processes
        self.weights: str = run.model.weights
        reason = _plain_because(run, processes.device) or cannot_fuse(adapted)
        if reason:
            _refuse_plain(run, reason)
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
            keep, stream = self.settings.keep, self.settings.stream
            levels: str | list[str] = keep if isinstance(keep, str) else list(keep)
            cache = self._cache()
            fuse(
                self.model, weights=self.weights, keep=levels, stream=stream, offload=self.settings.offload,
                shard=self.settings.shard, ranks=self.processes, cache=cache,
            )  # fmt: skip
            if cache and self.processes.is_main:
                print(
                    f"weights: {len(cache.read)} layers from {cache.folder}, {len(cache.made)} made from the base"
                )

    def _cache(self) -> WeightCache | None:
        """Where this run's weights are kept in the form that they have here."""
        form = FORMS.get(self.weights)
        if self.settings.cache is None or form is None:
            return None
        checkpoint = open_checkpoint(self.settings.base, self.settings.config_from)
        base = checkpoint.identity(checkpoint.decoder_matrices())
        dtype = self.model.get_parameter("base_model.model.model.language_model.norm.weight").dtype
        return WeightCache(
            self.settings.cache, form, f"{base} {made_with(form, dtype, self.processes.device)}"
        )

    @property
    def lockstep(self) -> Lockstep:
        return lockstep_of(self.model)

    def ease(self) -> bool:
        """Recompute more from now on; False where there is nothing more to recompute."""
        return self.fused and keep_less(self.model)


def _refuse_plain(run: Run, reason: str) -> None:
    """HdlError for an option that only the fused path has; reason: why this run takes the plain one."""
    if run.model.kernels == "fused":
        raise HdlError(f"model.kernels fused: {reason}; use model.kernels auto")
    for option, found, without in (
        ("weights", run.model.weights, "full"),
        ("stream", run.model.stream, 0),
        ("offload", run.model.offload, 0),
        ("shard", run.model.shard, 0),
    ):
        if found != without:
            raise HdlError(
                f"model.{option} {found} needs the fused path, but {reason}; use model.{option} {without}"
            )


def _plain_because(run: Run, device: torch.device) -> str | None:
    if run.model.kernels == "plain":
        return "model.kernels is plain"
    if run.lora.dora:
        return "lora.dora needs each weight and its adapter as one matrix, whose rows' norms it sets"
    if run.model.kernels == "auto" and device.type == "cpu" and run.model.weights == "full":
        return "a CPU gains nothing from fused ones"
    if divides_weights(run.train):
        return "ZeRO-3 shards the frozen weights"
    return None
