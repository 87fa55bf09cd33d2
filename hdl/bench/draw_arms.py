"""An arm of the drawing benchmark: one way to take a sampler's step, guided, for several pictures at once.

    stock   the decoder of transformers with PEFT's adapter: a pass over text and picture a branch and step, all
            pictures of a branch as one batch. The published inference code takes the branches one by one, too.
    bf16    hdl's fused decoder: text read once, both branches of all pictures in one packed run
    fp8     the same with e4m3 weights

All draw the same weights from the same seed and are given the same text and noise; what is around the decoder's
prediction (guidance, UniPC) is the same code. Prompts are random embeddings of one length, the unconditional one has
the length that the chat template gives a single space.
"""

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from hdl.adapter.lora import adapter_parameters, attach
from hdl.bench.stock import stock_model
from hdl.config import Lora
from hdl.flow.noise import VARIANTS
from hdl.kernels.backend import has_fp8
from hdl.kernels.fuse import FusedDecoder, fuse_to_draw, fused_decoder
from hdl.o1.checkpoint import Checkpoint, load_model
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import PATCH
from hdl.sample.generate import Pack, Request, initial_generator, initial_noise
from hdl.sample.reading import Predict, predictor
from hdl.sample.schedulers import UniPC
from hdl.seeds import generator_for

STOCK = "stock"
ARMS = (STOCK, "bf16", "fp8")
STEPS, GUIDANCE, SHIFT = 50, 5.0, 3.0  # the full variant's own
SEED = 0
ADAPTER_STD = 0.005  # of B


@dataclass(frozen=True)
class DrawCase:
    """`pictures` square ones of `side` pixels; text, empty: tokens of their prompts and of the unconditional one."""

    name: str
    pictures: int
    side: int
    text: int
    empty: int

    def texts(self, dim: int) -> tuple[list[Tensor], Tensor]:
        """Embeddings [L, dim] of each prompt, and of the unconditional one."""
        generator = generator_for("bench drawing", self.name)
        drawn = [
            torch.randn(n, dim, generator=generator) * 0.02
            for n in [self.text] * self.pictures + [self.empty]
        ]
        return drawn[:-1], drawn[-1]

    def describe(self) -> str:
        return (
            f"{self.pictures} x {self.side}x{self.side} px, {self.text} text tokens, {self.empty} without a prompt; "
            f"UniPC, {STEPS} steps, guidance {GUIDANCE:g}"
        )


def draw_cases(tiny: bool) -> dict[str, DrawCase]:
    """By name. tiny: the same with pictures of a few patches, for a CPU."""
    scale, text, empty = (16, 10, 4) if tiny else (1, 160, 11)
    return {
        name: DrawCase(name, pictures, side // scale, text, empty)
        for name, pictures, side in (("2048x1", 1, 2048), ("1024x8", 8, 1024))
    }


@dataclass(frozen=True)
class DrawSetup:
    """What all arms have in common. config_file: the model's config.json."""

    checkpoint: Checkpoint
    config_file: Path
    lora: Lora
    device: torch.device
    dtype: torch.dtype


class DrawArm:
    """`begin` reads a case's prompts where the arm does so beforehand, `step` takes the sampler's next step."""

    def __init__(self, name: str, setup: DrawSetup) -> None:
        self.name, self.setup, self.device = name, setup, setup.device
        place = (setup.device, setup.dtype)
        if name == STOCK:
            self.model = stock_model(
                setup.checkpoint, setup.config_file, setup.lora, SEED, *place, recompute=False
            )
        else:
            self.model = attach(load_model(setup.checkpoint, *place, absent=True), setup.lora, "", SEED)
            no_fp8 = setup.device.type == "cuda" and not has_fp8(setup.device)
            form = "full" if name == "bf16" else "fp8_stored" if no_fp8 else "fp8"
            fuse_to_draw(self.model, weights=form)
        _fill_adapter(self.model)
        self.model.requires_grad_(False).eval()

    @property
    def fused(self) -> FusedDecoder | None:
        return None if self.name == STOCK else fused_decoder(self.model)

    def begin(self, case: DrawCase, *, once: bool = True) -> None:
        """Be at the start of a case's pictures. once: False reads the text in every step."""
        texts, self.empty = case.texts(self.setup.checkpoint.config.hidden_size)
        self.requests = [Request(text, case.side, case.side, seed) for seed, text in enumerate(texts)]
        self.read(once=once)
        noise_scale = VARIANTS["full"].noise_scale
        z = [initial_noise(request, initial_generator(request), noise_scale) for request in self.requests]
        self.z = torch.cat(z).to(self.device)
        self.scheduler = UniPC(STEPS, SHIFT)
        self.at = 0

    def read(self, *, once: bool = True) -> None:
        """The prompts, as far as the arm does so beforehand."""
        if self.name == STOCK:
            predict = _branches(self.model, self.requests, self.empty, self.device)
            self.pack = Pack(self.requests, True, predict)
        else:
            self.pack = Pack.of(self.model, self.requests, self.empty, True, self.device, read_once=once)

    @torch.no_grad()
    def step(self) -> None:
        """The next step, as hdl.sample.generate.denoise takes it."""
        v = self.pack.velocity(self.z, self.scheduler.timesteps[self.at], GUIDANCE)
        self.z = self.scheduler.step(self.at, v, self.z, None)
        self.at += 1

    def predict(self) -> Tensor:
        """x_pred of both branches [2 P, 3072], float32, at the present z and the first timestep."""
        t = torch.full((2 * len(self.pack.requests),), 0.001, device=self.device)
        return self.pack.predict(torch.cat([self.z, self.z]), t).float()

    def without_graphs(self) -> AbstractContextManager[None]:
        """Steps in here launch every kernel by itself."""
        graphs = self.fused.step_graphs if self.fused else None
        return graphs.paused() if graphs else nullcontext()

    def forget_graphs(self) -> None:
        if self.fused and self.fused.step_graphs:
            self.fused.step_graphs.drop()

    def end(self) -> None:
        """Let go of the case."""
        del self.pack, self.z, self.scheduler, self.requests

    def close(self) -> None:
        """Let go of everything on the device; the arm is of no use any more."""
        del self.model
        gc.collect()


def _branches(model: nn.Module, requests: Sequence[Request], empty: Tensor, device: torch.device) -> Predict:
    """Both branches one after the other, each one batch."""

    def branch(texts: Sequence[Tensor]) -> Predict:
        segments = [
            Segment(len(text), r.height // PATCH, r.width // PATCH) for text, r in zip(texts, requests)
        ]
        text = torch.cat(list(texts)).to(device)
        return predictor(model, text, lay_out(segments).to(device), once=False)

    branches = branch([request.text for request in requests]), branch([empty] * len(requests))

    def predict(z: Tensor, t: Tensor) -> Tensor:
        parts = zip(branches, z.chunk(2), t.chunk(2))
        return torch.cat([one(of_z, of_t) for one, of_z, of_t in parts])

    return predict


def _fill_adapter(model: PeftModel) -> None:
    """Numbers that depend on names alone; what they add is about a tenth of what the frozen weights make."""
    for name, parameter in adapter_parameters(model).items():
        std = ADAPTER_STD if "lora_B" in name else parameter.shape[1] ** -0.5
        drawn = torch.empty(parameter.shape, device=parameter.device)
        parameter.data.copy_(drawn.normal_(0, std, generator=generator_for(name, device=parameter.device)))
