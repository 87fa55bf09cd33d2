"""DeepSpeed's clipping under ZeRO 1 and 2, without its waits for the GPU.

DeepSpeed 0.19 computes in optimizer.step()

    norm = sqrt(sum of g^2 over all ranks' gradients),    g <- g / max(1, (norm + 1e-6) / clip)

but stops the host twice on the way, to mask and to look for a norm that is not finite, and converts the
whole gradient to float64 first. Here the same is computed where the gradients are. So is what follows from a norm
that is not finite: torch's AdamW then changes neither weights nor moments nor its count of steps, as it is told by
a number on the device that only gradient scalers usually set. hdl reads the norm later (hdl/engine/skipping.py).
Where DeepSpeed waits anyway, for an optimizer in host memory, it is left to look for such gradients itself.

With a bfloat16 master, gradients stay bfloat16 as backward left them, and so does the factor: up to 0.4 %
off, for all of them alike.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def clip_without_waiting(engine: DeepSpeedEngine) -> None:
    """Give the engine's optimizer these; other kinds (ZeRO-3, moments in host memory) keep their own."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    if optimizer.cpu_offload:
        optimizer.check_grad_overflow = True
    else:
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            optimizer.optimizer.found_inf = torch.zeros((), device=engine.device)  # type: ignore[attr-defined]
        optimizer.scaled_global_norm = partial(_global_norm, optimizer)
        optimizer.unscale_and_clip_grads = partial(_clip, optimizer.clip_grad)


def _global_norm(optimizer: Any) -> Tensor:
    """float32, on the device; inf or NaN where a gradient is."""
    gradients = [
        g for group in range(len(optimizer.bit16_groups)) for g in optimizer.averaged_gradients[group]
    ]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    squares = torch.stack(norms).square().sum()
    if dist.get_world_size(optimizer.dp_process_group) > 1:
        dist.all_reduce(squares, group=optimizer.dp_process_group)
    norm = squares.sqrt()
    if hasattr(optimizer.optimizer, "found_inf"):
        optimizer.optimizer.found_inf = norm.isfinite().logical_not().float()
    return norm


def _clip(largest: float, gradients: Iterable[Tensor], norm: Tensor) -> None:
    if largest > 0:
        factor = ((norm + 1e-6) / largest).clamp(min=1.0).reciprocal()
        for gradient in gradients:
            gradient.mul_(factor)
