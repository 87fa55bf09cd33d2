"""Trains a small O1 from nothing on drawn scenes, until it draws what a prompt says.

The model, its noise and its checkpoint are hdl's own; only this loop is the small model's: one process, every
parameter trained, single-length batches. The model computes in bfloat16, the dtype it is published in; the weights
that the optimizer moves are float32 copies, and what is saved is their moving average.

The run ends after so many steps or so many minutes, whichever comes first, and the learning rate follows whichever
is further along: it reaches zero in time on a slow machine too.
"""

import csv
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from hdl.errors import HdlError
from hdl.flow.loss import patch_errors
from hdl.flow.noise import VARIANTS, add_noise
from hdl.mini.pool import Pool, draw_pool, training_captions
from hdl.mini.save import save_checkpoint
from hdl.mini.shapes import CANVAS
from hdl.mini.tokenizer import chat_ids, train_tokenizer
from hdl.o1.config import parse_config
from hdl.o1.decoder import O1
from hdl.o1.layout import Layout, Segment, lay_out
from hdl.o1.patches import PATCH, patchify, to_model
from hdl.o1.prompt import UNCONDITIONAL_PROMPT

BANDS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # sigmas at which the loss on fresh scenes is watched
GRID = CANVAS // PATCH
TOKENIZER_CAPTIONS = 10_000
WATCHED = 256  # of the fresh scenes: as many of the commonest caption length
EMA_DECAY = 0.999
TABLE_STD = 0.5


@dataclass(frozen=True)
class Recipe:
    """How to pretrain. Times in minutes from the first step; drawing the scenes comes on top."""

    steps: int
    minutes: float
    batch: int  # pictures a step
    scenes: int  # drawn beforehand
    fresh_scenes: int = 5000  # drawn to watch the loss on, never trained on
    learning_rate: float = 1.5e-3
    warmup: float = 0.02  # share of the run
    caption_dropout: float = 0.1  # share of steps on the unconditional prompt
    clip: float = 1.0  # gradient norm
    seed: int = 0
    log_every: int = 100  # steps
    watch_every: int = 1000  # steps; also saves


class Learner(nn.Module):
    """The model and its token table: everything that is trained."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        shape = parse_config(config)
        self.o1 = O1(shape)
        self.table = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.table.weight, std=TABLE_STD)
        for name, module in self.o1.named_modules():
            if name.endswith(
                ("o_proj", "down_proj")
            ):  # starting small, they leave the residual stream undisturbed
                nn.init.normal_(module.weight, std=(module.in_features * 2 * shape.num_hidden_layers) ** -0.5)
        nn.init.zeros_(self.o1.model.final_layer2.linear.weight)
        nn.init.zeros_(self.o1.model.final_layer2.linear.bias)

    def forward(self, ids: Tensor, z: Tensor, sigma: Tensor, layout: Layout) -> Tensor:
        """ids [B, L], z [B*16, 3072], sigma [B] -> x_pred [B*16, 3072]."""
        return self.o1(self.table(ids.flatten()), z, 1 - sigma, layout)


def pretrain(out: Path, config: dict[str, Any], recipe: Recipe, device: str) -> list[dict[str, float]]:
    """Trains a model of `config` and writes checkpoint and curve.csv into `out`; returns the curve's rows.

    HdlError when the loss stops being a number.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(training_captions(TOKENIZER_CAPTIONS, recipe.seed + 1))
    pool = draw_pool(recipe.scenes, tokenizer, recipe.seed + 2)
    watched = draw_pool(recipe.fresh_scenes, tokenizer, recipe.seed + 3).to(device)
    torch.manual_seed(recipe.seed)
    learner = Learner(config).to(device, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    weights: list[Tensor] = list(learner.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    average = [master.clone() for master in masters]
    optimizer = torch.optim.AdamW(
        masters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    batches = Batches(pool.to(device), tokenizer, recipe, device)
    take_step = GraphedSteps(learner) if device.startswith("cuda") else partial(train_step, learner)
    curve: list[dict[str, float]] = []
    losses: list[Tensor] = []
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * warm_then_cosine(progress, recipe.warmup)
        losses.append(take_step(*batches.next()))
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        nn.utils.clip_grad_norm_(masters, recipe.clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
            torch._foreach_lerp_(average, masters, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        step += 1
        minutes = (time.monotonic() - began) / 60
        progress = max(step / recipe.steps, minutes / recipe.minutes)
        if step % recipe.log_every == 0 or progress >= 1:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise HdlError(f"the loss is {loss} at step {step}; try a lower learning rate")
            row = {"step": step, "minutes": minutes, "rate": optimizer.param_groups[0]["lr"], "loss": loss}
            if step % recipe.watch_every == 0 or progress >= 1:
                row |= evaluate_average(learner, average, masters, watched)
                save(out, config, learner, average, tokenizer)
            curve.append(row)
            write_curve(out / "curve.csv", curve)
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return curve


def warm_then_cosine(progress: float, warmup: float) -> float:
    """The learning rate's factor: up from near zero over the warm-up's share, then half a cosine down to zero."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Batches:
    """Random batches of one caption length each, now and then with the unconditional prompt instead."""

    def __init__(self, pool: Pool, tokenizer: Tokenizer, recipe: Recipe, device: str) -> None:
        self.pool, self.batch, self.device = pool, recipe.batch, device
        self.dropout = recipe.caption_dropout
        self.empty = torch.tensor(chat_ids(tokenizer, UNCONDITIONAL_PROMPT), device=device)
        # Captions of a rare length would be read over and over.
        shares = pool.lengths(at_least=recipe.scenes // 200)
        self.lengths, self.shares = list(shares), torch.tensor(list(shares.values()))
        self.layouts: dict[int, Layout] = {}

    def next(self) -> tuple[Tensor, Tensor, Layout]:
        """Pictures uint8 [B, 128, 128, 3], token ids [B, L], and their layout."""
        length = self.lengths[int(torch.multinomial(self.shares, 1))]
        pictures, ids = self.pool.draw(length, self.batch)
        if torch.rand(()) < self.dropout:
            ids = self.empty.expand(self.batch, -1)
        return pictures, ids, self._layout(ids.shape[1])

    def _layout(self, length: int) -> Layout:
        if length not in self.layouts:
            self.layouts[length] = lay_out([Segment(length, GRID, GRID)] * self.batch).to(self.device)
        return self.layouts[length]


class GraphedSteps:
    """`train_step` as one CUDA graph a caption length: launching its kernels takes longer than running them."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.memory = torch.cuda.graph_pool_handle()  # one for all graphs: only one of them runs at a time
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, pictures: Tensor, ids: Tensor, layout: Layout) -> Tensor:
        length = ids.shape[1]
        if length not in self.graphs:
            self.graphs[length] = self._capture(pictures.clone(), ids.clone(), layout)
        graph, graph_pictures, graph_ids, loss = self.graphs[length]
        graph_pictures.copy_(pictures)
        graph_ids.copy_(ids)
        graph.replay()
        return loss.clone()

    def _capture(
        self, pictures: Tensor, ids: Tensor, layout: Layout
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is set up on first use, gradients too, must not be captured
            for _ in range(3):
                train_step(self.learner, pictures, ids, layout)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            loss = train_step(self.learner, pictures, ids, layout)
        return graph, pictures, ids, loss


def train_step(learner: Learner, pictures: Tensor, ids: Tensor, layout: Layout) -> Tensor:
    """Leaves gradients on the learner's parameters; returns the mean squared error of x0, unweighted.

    Sigma is uniform, one value in each of B equal parts. Errors are weighted by 1/(sigma + 0.2): a caption says
    almost all there is to draw, so low noise levels, where a picture gets its last finish, would count too little.
    """
    for weight in learner.parameters():
        if weight.grad is not None:
            weight.grad.zero_()  # in place: a CUDA graph needs gradients to stay where they are
    batch = len(pictures)
    # The parts need no shuffling: which picture stands where in the batch is random already.
    sigma = (torch.arange(batch, device=ids.device) + torch.rand(batch, device=ids.device)) / batch
    errors = x0_errors(learner, pictures, ids, sigma, layout)
    (errors / (sigma + 0.2)).mean().backward()
    return errors.detach().mean()


def x0_errors(learner: Learner, pictures: Tensor, ids: Tensor, sigma: Tensor, layout: Layout) -> Tensor:
    """float32 [B]: mean squared error of the predicted clean picture at noise level sigma [B]."""
    x0 = to_model(patchify(pictures.flatten(0, 1)))  # pictures on top of each other are one tall picture
    z = add_noise(
        x0, torch.randn_like(x0), sigma.repeat_interleave(GRID * GRID), VARIANTS["full"].noise_scale
    )
    return patch_errors(learner(ids, z, sigma, layout), x0).view(len(pictures), -1).mean(1)


@torch.no_grad()
def evaluate_average(
    learner: Learner, average: list[Tensor], masters: list[Tensor], watched: Pool
) -> dict[str, float]:
    """The averaged weights' x0 error on fresh scenes at each of BANDS."""
    weights: list[Tensor] = list(learner.parameters())
    torch._foreach_copy_(weights, average)
    length = max(watched.scenes_by_length, key=lambda length: len(watched.scenes_by_length[length]))
    scenes = watched.scenes_by_length[length][:WATCHED]
    ids = watched.ids_by_length[length][:WATCHED]
    layout = lay_out([Segment(length, GRID, GRID)] * len(scenes)).to(ids.device)
    errors = {}
    for sigma in BANDS:
        levels = torch.full((len(scenes),), sigma, device=ids.device)
        errors[f"x0 {sigma}"] = (
            x0_errors(learner, watched.pictures[scenes], ids, levels, layout).mean().item()
        )
    torch._foreach_copy_(weights, masters)
    return errors


def save(
    out: Path, config: dict[str, Any], learner: Learner, average: list[Tensor], tokenizer: Tokenizer
) -> None:
    """Writes the averaged weights as a published checkpoint."""
    names = [name for name, _ in learner.named_parameters()]
    averaged = dict(zip(names, average, strict=True))
    table = averaged.pop("table.weight")
    save_checkpoint(out, config, {n.removeprefix("o1."): w for n, w in averaged.items()}, table, tokenizer)


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """One line every `log_every` steps; the errors on fresh scenes are filled in where they were taken."""
    columns = ["step", "minutes", "rate", "loss", *[f"x0 {sigma}" for sigma in BANDS]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in curve)
