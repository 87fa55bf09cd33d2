"""Our arms: hdl's model with its adapter, plain or fused, in bfloat16 or fp8.

plain   the PEFT path that the tests hold the fused one against; nothing recomputed
bf16    the fused decoder path
fp8     the same with fp8 arithmetic on the frozen weights
kept    bf16, with a fifth of the samples, preserve.share's default, held against the base's own prediction: what
        preservation costs is this arm's time against bf16's at 1024x5, where every step keeps one
"""

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hdl.adapter.lora import attach
from hdl.config import Lora
from hdl.data.batches import Batch
from hdl.kernels.fuse import flatten, fuse
from hdl.o1.checkpoint import Checkpoint, load_model
from hdl.o1.layout import lay_out

KEPT = "kept"
OURS = ("plain", "bf16", "fp8", KEPT)
EVERY = 5  # of whose samples one is kept


def our_model(
    name: str, checkpoint: Checkpoint, lora: Lora, seed: int, device: torch.device, dtype: torch.dtype
) -> PeftModel:
    """The adapted model of an arm, ready for an engine."""
    model = load_model(checkpoint, device, dtype, absent=name != "plain")
    adapted = attach(model, lora, str(checkpoint.path), seed)
    if name != "plain":
        flatten(adapted)
    return adapted


def speed_up(name: str, adapted: PeftModel, fp8: bool) -> None:
    """Put a model that an engine has taken on the path of its arm. fp8: whether the GPU multiplies in it."""
    if name != "plain":
        fuse(adapted, weights="fp8" if name == "fp8" and fp8 else "full")


def loss_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What flow_matching_loss is given beside the usual."""
    return {"fused": name != "plain", "dtype": dtype}


def keeping(batch: Batch, number: int) -> Batch:
    """A step's micro-batch with its last sample of every five kept, and of every five steps one where it has fewer."""
    count = len(batch.places)
    kept = tuple((number * count + place + 1) % EVERY == 0 for place in batch.places)
    chosen = [i for i in range(count) if kept[i]]
    if not chosen:
        return batch

    def part(whole: Tensor, sizes: list[int]) -> Tensor:
        pieces = whole.split(sizes)
        return torch.cat([pieces[i] for i in chosen])

    segments = batch.layout.segments
    base = replace(
        batch, keys=[batch.keys[i] for i in chosen], places=[batch.places[i] for i in chosen],
        weights=[batch.weights[i] for i in chosen], text=part(batch.text, [s.text for s in segments]),
        patches=part(batch.patches, batch.patch_counts), layout=lay_out([segments[i] for i in chosen]),
    )  # fmt: skip
    return replace(batch, kept=kept, base=base)
