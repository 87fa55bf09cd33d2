"""Our arms: hdl's model with its adapter, plain or fused, in bfloat16 or fp8.

plain   the PEFT path that the tests hold the fused one against; nothing recomputed
bf16    the fused decoder path
fp8     the same with fp8 arithmetic on the frozen weights
"""

from typing import Any

import torch
from peft import PeftModel

from hdl.adapter.lora import attach
from hdl.config import Lora
from hdl.kernels.fuse import flatten, fuse
from hdl.o1.checkpoint import Checkpoint, load_model

OURS = ("plain", "bf16", "fp8")


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
