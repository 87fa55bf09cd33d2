"""How ZeRO and the optimizers hold a run's state: flat partitions of the master weights, one or a few a rank, and
beside each the moments of its optimizer.

bitsandbytes keeps moments as 8-bit codes with block scales; while moments are being read or written they stand
there dequantized under Adam's names, and go back to codes afterwards. Some then differ by a percent of their
block's largest, as 8-bit codes reach from -0.993 to 1: in the run that goes on just as in one resumed from what
was read.

A paged optimizer's codes lie in CUDA's managed memory, and torch takes them for tensors on the CPU; the scales are
on the GPU, where codes are copied to be read. bitsandbytes waits for the GPU after every paged step, so there is
nothing to wait for here. (Tested on a CPU, where nothing is paged; not yet on a GPU.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256  # bitsandbytes' 8-bit optimizers scale blocks of this many numbers


def flat_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's partitions of the master weights: ZeRO-1/2 and ZeRO-3 name them differently."""
    zero = engine.optimizer
    return list(
        zero.fp32_partitioned_groups_flat if is_zero3(engine) else zero.single_partition_of_fp32_groups
    )


def is_zero3(engine: DeepSpeedEngine) -> bool:
    return not hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def states(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """The optimizer's state of each partition."""
    base = engine.optimizer.optimizer
    return [base.state[flat] for flat in flat_partitions(engine)]


def create_states(engine: DeepSpeedEngine) -> None:
    """Optimizers make their state in the first step: take one that changes nothing (no gradient, rate 0)."""
    base = engine.optimizer.optimizer
    group = base.param_groups[0]  # hdl trains one group of parameters
    kept = group["params"], group["lr"]
    group["lr"] = 0.0
    for flat in flat_partitions(engine):
        group["params"] = [flat]
        flat.grad = torch.zeros_like(flat)
        base.step()
        flat.grad = None
    group["params"], group["lr"] = kept
    set_updates(engine, 0)


def set_updates(engine: DeepSpeedEngine, updates: int) -> None:
    """How often the optimizer has stepped, which its bias correction goes by."""
    for state in states(engine):
        if torch.is_tensor(state["step"]):
            state["step"].fill_(updates)
        else:
            state["step"] = updates


@contextmanager
def under_adams_names(engine: DeepSpeedEngine) -> Iterator[None]:
    """Every partition's moments as float32, `exp_avg` and `exp_avg_sq`; they may be written to."""
    quantized = [state for state in states(engine) if "state1" in state]
    for state in quantized:
        for moment, n in zip(MOMENTS, "12"):
            state[moment] = _dequantized(state, n)
    yield
    for state in quantized:
        for moment, n in zip(MOMENTS, "12"):
            _quantize_into(state, n, state.pop(moment))


def _dequantized(state: dict[str, Any], n: str) -> Tensor:
    codes = state[f"state{n}"]
    if codes.dtype != torch.uint8:  # small tensors stay in float32
        return codes.clone()
    from bitsandbytes.functional import dequantize_blockwise

    scales = state[f"absmax{n}"]
    return dequantize_blockwise(
        codes.to(scales.device), absmax=scales, code=state[f"qmap{n}"], blocksize=BLOCK
    )


def _quantize_into(state: dict[str, Any], n: str, values: Tensor) -> None:
    codes = state[f"state{n}"]
    if codes.dtype != torch.uint8:
        codes.copy_(values)
        return
    from bitsandbytes.functional import quantize_blockwise

    fresh, scales = quantize_blockwise(values, code=state[f"qmap{n}"], blocksize=BLOCK)
    codes.copy_(fresh)
    state[f"absmax{n}"].copy_(scales.absmax)
