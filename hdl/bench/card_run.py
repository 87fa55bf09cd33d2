"""One setting trained for a few steps, through the code of a run: how much memory it took, and how long.

The model is loaded, adapted, packed and handed to DeepSpeed as hdl.engine.loop does it, and steps are those of
hdl.engine.step. Each is timed from a synchronized GPU to a synchronized GPU, everything included. The peak is that of
the allocator's reserved memory since the process began, or since `measure` was called in a process that measures
several settings; what those before have left is subtracted.
"""

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from peft import PeftModel

from hdl.adapter.lora import attach
from hdl.bench.arms import FLOW, SEED, take_step
from hdl.bench.cards import RESERVED, Setting
from hdl.bench.cases import packs, random_samples
from hdl.bench.timing import give_back
from hdl.data.batches import Batch
from hdl.engine.fast_path import FastPath
from hdl.engine.processes import Processes
from hdl.engine.step import TrainStep
from hdl.errors import ran_out_of_memory
from hdl.flow.noise import VARIANTS
from hdl.kernels.fuse import FORMS, STREAMED, FusedDecoder, Packed, fuse_with
from hdl.kernels.scratch import Scratch
from hdl.memory.host import GIB
from hdl.memory.streaming import spread
from hdl.o1.checkpoint import Checkpoint, RandomCheckpoint, load_model

COPIES = 8  # whose time is taken together


@dataclass
class Figures:
    """Bytes and seconds. reserved: the allocator's peak, None without a GPU; context: what the GPU's driver has
    taken beside it; seconds: of each step; loading: of reading and packing weights; host_peak, host_kept: of the
    process's own memory while loading and afterwards, less what it had before; rates: of copies from and to the host,
    bytes a second; failed: what the allocator said when memory ran out."""

    reserved: int | None = None
    context: int | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loading: float = 0.0
    host_peak: int = 0
    host_kept: int = 0
    block: int = 0  # bytes of a streamed layer
    rates: dict[str, float] = field(default_factory=dict)
    failed: str | None = None

    @property
    def step(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"step": self.step}


class HostPeak:
    """Watches the process's own memory, that of files it maps left out, from a thread of its own."""

    def __init__(self) -> None:
        self.before = self.most = own_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "HostPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.kept = own_memory() - self.before
        self.peak = max(self.most - self.before, self.kept)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, own_memory())


def own_memory() -> int:
    """Bytes that are in no file: the heap, and memory shared with other ranks."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def hold_to(card: float | None, device: torch.device) -> None:
    """Let the allocator take what it could of such a card."""
    if device.type == "cuda" and card is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min((card - RESERVED) * GIB / total, 1.0), device)


def measure(
    setting: Setting,
    checkpoint: Checkpoint,
    processes: Processes,
    *,
    dtype: torch.dtype,
    steps: int,
    warmup: int,
    cache: Path | None = None,
    left: int = 0,
) -> Figures:
    """Train so for `warmup` steps and `steps` timed ones (none of both: only load). left: bytes reserved by what was
    before. Everything is let go on return."""
    figures, device = Figures(), processes.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    hold_to(setting.card, device)
    try:
        _train(setting, checkpoint, processes, figures, dtype, steps, warmup, cache)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        figures.failed = ". ".join(str(error).split(". ")[:2])
    if device.type == "cuda":
        figures.reserved = torch.cuda.max_memory_reserved(device) - left
        free, total = torch.cuda.mem_get_info(device)
        figures.context = total - free - torch.cuda.memory_reserved(device)
    gc.collect()
    give_back()
    return figures


def _train(
    setting: Setting, checkpoint: Checkpoint, processes: Processes, figures: Figures,
    dtype: torch.dtype, steps: int, warmup: int, cache: Path | None,
) -> None:  # fmt: skip
    from hdl.engine.sharding import shard  # imports DeepSpeed, which takes seconds

    device = processes.device
    run = setting.run(checkpoint.path, cache, isinstance(checkpoint, RandomCheckpoint))
    with HostPeak() as host:
        start = time.perf_counter()
        model = load_model(checkpoint, device, dtype, absent=True)
        figures.loading = _since(start, device)
        adapted = attach(model, run.lora, str(checkpoint.path), SEED)
        path = FastPath(run, adapted, processes)
        path.prepare()
        engine = shard(adapted, run.train, dtype, processes)
        start = time.perf_counter()
        _fuse_in_place(adapted, setting) if setting.in_place else path.apply()
        figures.loading += _since(start, device)
    figures.host_peak, figures.host_kept = host.peak, host.kept
    try:
        engine.train()
        train_step = TrainStep(
            engine, processes,
            variant=VARIANTS["full"], flow=FLOW, seed=SEED, dropout=0.0, dtype=dtype, fused=True,
        )  # fmt: skip
        for number in range(warmup + steps):
            batches = _batches(setting, number, checkpoint.config.hidden_size, pin=device.type == "cuda")
            start = time.perf_counter()
            loss = take_step(train_step, number, batches, setting.words())
            if number >= warmup:
                figures.seconds.append(_since(start, device))
                figures.losses.append(loss)
        _rate_copies(decoder_of(adapted), figures, device)
    finally:
        engine.destroy()


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def decoder_of(adapted: PeftModel) -> FusedDecoder:
    forward = adapted.get_submodule("base_model.model.model.language_model").forward
    return cast(FusedDecoder, forward.__self__)  # type: ignore[attr-defined]


def _fuse_in_place(adapted: PeftModel, setting: Setting) -> None:
    layers, scratch = len(setting.keep), Scratch()
    streamed = spread(setting.stream, layers) if setting.stream else []
    packed: list[Packed] = [
        partial((STREAMED if i in streamed else FORMS)[setting.weights], scratch=scratch)
        for i in range(layers)
    ]
    fuse_with(adapted, packed, list(setting.keep))


def _batches(setting: Setting, number: int, dim: int, pin: bool) -> list[Batch]:
    return packs(random_samples(setting.segments, "card", number, dim), together=True, pin=pin)


def _rate_copies(decoder: FusedDecoder, figures: Figures, device: torch.device) -> None:
    """How fast blocks and things really come and go, by themselves, on streams of their own."""
    streaming, offload = decoder.streaming, decoder.offload
    if streaming.count:
        slot, blocks = streaming.slots[0], streaming._blocks
        figures.block = slot.nbytes
        pairs = [(slot, blocks[i % len(blocks)]) for i in range(COPIES)]
        figures.rates["weights in"] = (
            COPIES * slot.nbytes / _timed(lambda: streaming.mover.copy_all(pairs), device)
        )
        streaming.held = [None] * len(streaming.held)  # the slots hold anything now
    hosts = [host.bytes for host in offload._host if host is not None]
    if hosts:
        there = torch.empty(len(hosts[0]), dtype=torch.uint8, device=device)
        for name, pair in (("things out", (hosts[0], there)), ("things in", (there, hosts[0]))):
            pairs = [pair] * COPIES
            figures.rates[name] = (
                COPIES * len(there) / _timed(partial(offload._mover.copy_all, pairs), device)
            )


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _since(0.0, device)
    start = time.perf_counter()
    work()
    return _since(start, device)
