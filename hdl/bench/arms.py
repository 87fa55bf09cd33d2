"""An arm: one way to take a training step, from uint8 pixels in host memory to an updated adapter.

All arms draw the same frozen weights from the same seed, take the same samples, and measure the same
loss. hdl's own arms step as a run does (`hdl.engine.step`), through DeepSpeed by default, looking at the
loss before the optimizer steps; but each step is timed to its end, so the gradient's norm is read right
after it. The stock arm's engine is PyTorch's: fused AdamW and clip_grad_norm_, the loss read when the step
is done.
"""

import gc
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.profiler import record_function

from hdl.adapter.lora import Switch
from hdl.bench.ours import KEPT, OURS, keeping, loss_options, our_model, speed_up
from hdl.bench.stock import stock_loss, stock_model
from hdl.config import Flow, Lora, Train
from hdl.data.batches import Batch
from hdl.engine.processes import Processes
from hdl.engine.step import Measured, TrainStep
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS
from hdl.flow.sigma import draw_sigmas
from hdl.kernels.backend import has_fp8
from hdl.kernels.fuse import graphs_of
from hdl.o1.checkpoint import Checkpoint

STOCK = "stock"
ARMS = (STOCK, *OURS)
SEED = 0
FLOW = Flow()
EngineName = Literal["deepspeed", "torch"]


@dataclass(frozen=True)
class Setup:
    """What all arms have in common. config_file: the model's config.json; strategy: a ds_configs/ file."""

    checkpoint: Checkpoint
    config_file: Path
    lora: Lora
    dtype: torch.dtype
    processes: Processes
    engine: EngineName
    strategy: Path

    @property
    def device(self) -> torch.device:
        return self.processes.device


class Arm:
    """precision: of its big GEMMs, hence which ceiling it is held against. packs_sizes: whether images of
    several sizes go through together."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self.precision = "fp8" if name == "fp8" and has_fp8(setup.device) else _short(setup.dtype)
        self.packs_sizes = name != STOCK
        self.device = setup.device
        self.model, self.engine = _engine(name, setup)
        self.engine.train()
        self.train_step: TrainStep | None = None
        if name != STOCK:
            self.train_step = TrainStep(
                self.engine, setup.processes,
                variant=VARIANTS["full"], flow=FLOW, seed=SEED, dropout=setup.lora.dropout,
                base=Switch(self.model).off, **loss_options(name, setup.dtype),
            )  # fmt: skip

    def step(self, number: int, batches: Sequence[Batch]) -> float:
        """Train on a step's batches, which lie in host memory; returns the loss."""
        if not self.train_step:
            return self._stock_step(batches, sigmas_of(number, batches))
        if self.name == KEPT:
            batches = [keeping(batch, number) for batch in batches]
        return take_step(self.train_step, number, batches, f"arm {self.name}")

    def _stock_step(self, batches: Sequence[Batch], sigmas: Tensor) -> float:
        losses = []
        for batch in batches:
            batch = batch.to(self.device)
            eps = torch.randn(batch.patches.shape, device=self.device)
            loss = stock_loss(self.engine, batch, sigmas[batch.places].to(self.device), eps)
            self.engine.backward(loss)
            losses.append(loss.detach())
        self.engine.step()
        return float(torch.stack(losses).sum())

    def without_graphs(self) -> AbstractContextManager[None]:
        """Steps in here launch every kernel by itself."""
        graphs = None if self.name == STOCK else graphs_of(self.model)
        return graphs.paused() if graphs else nullcontext()

    def close(self) -> None:
        """Let go of everything on the device; the arm is of no use any more."""
        if hasattr(self.engine, "destroy"):
            self.engine.destroy()
        self.train_step = None
        del self.engine, self.model
        gc.collect()


def take_step(train_step: TrainStep, number: int, batches: Sequence[Batch], name: str) -> float:
    """As a run does it, waiting for the optimizer; returns the loss. HdlError when that is no number."""
    measured = Measured.read(train_step.forward_backward(number, batches, sigmas_of(number, batches)))
    if not math.isfinite(measured.loss):
        raise HdlError(f"{name}: the loss of step {number} is {measured.loss}: it computes nonsense")
    with record_function("hdl::optimizer"):
        norm = train_step.update()
    norm.wait()
    return measured.loss


def sigmas_of(number: int, batches: Sequence[Batch]) -> Tensor:
    """A step's noise levels, by sample."""
    images = sum(len(batch.places) for batch in batches)
    return draw_sigmas(
        images, SEED, number,
        distribution=FLOW.sigma, mean=FLOW.logit_mean, std=FLOW.logit_std, shift=FLOW.shift,
    )  # fmt: skip


class TorchEngine:
    """DeepSpeed's few methods over plain PyTorch; adapter and optimizer state in `dtype`."""

    def __init__(self, model: PeftModel, train: Train, dtype: torch.dtype) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )
        self.clip = train.grad_clip
        self.norm: Tensor | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return self.model(*inputs, **options)

    def train(self) -> None:
        self.model.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> Tensor | None:
        return self.norm


def _engine(name: str, setup: Setup) -> tuple[PeftModel, Any]:
    """The arm's model, and what steps it."""
    train = Train(batch_size=1, warmup_steps=0, deepspeed=setup.strategy)
    place = (setup.lora, SEED, setup.device, setup.dtype)
    if name == STOCK:
        model = stock_model(setup.checkpoint, setup.config_file, *place)
        return model, TorchEngine(model, train, setup.dtype)
    model = our_model(name, setup.checkpoint, *place)
    engine: Any
    if setup.engine == "torch":
        engine = TorchEngine(model, train, setup.dtype)
    else:
        from hdl.engine.sharding import shard  # imports DeepSpeed, which takes seconds

        engine = shard(model, train, setup.dtype, setup.processes)
    speed_up(name, model, fp8=has_fp8(setup.device))
    return model, engine


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
