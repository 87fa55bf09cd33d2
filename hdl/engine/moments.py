"""The optimizer's moments as full float32 tensors per parameter, whatever shards or quantizes them.

ZeRO keeps the moments in flat partitions inside the base optimizer; DeepSpeed's accessors can read and
write them per parameter under Adam's names, `exp_avg` and `exp_avg_sq`. bitsandbytes keeps them as 8-bit
codes with block scales; while moments are being read or written they stand there dequantized under
Adam's names, and go back to codes afterwards. Some then differ by a percent of their block's largest, as
8-bit codes reach from -0.993 to 1: in the run that goes on just as in one resumed from what was read.

A paged optimizer's codes lie in CUDA's managed memory, and torch takes them for tensors on the CPU; the
scales are on the GPU, where codes are copied to be read. bitsandbytes waits for the GPU after every paged
step, so there is nothing to wait for here. (Tested on a CPU, where nothing is paged; not yet on a GPU.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor

from hdl.adapter.flat import by_name, in_flat, trained_parameters
from hdl.adapter.lora import adapter_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256  # bitsandbytes' 8-bit optimizers scale blocks of this many numbers


def read_moments(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """`NAME.exp_avg` and `NAME.exp_avg_sq` of every adapter parameter, float32 on the CPU.

    Every rank must call this.
    """
    moments: dict[str, Tensor] = {}
    if not all(_states(engine)):  # before the first step
        _create_state(engine)
        _set_steps(engine, 0)
    with _under_adams_names(engine):
        for moment in MOMENTS:
            trained = {
                name: safe_get_full_optimizer_state(parameter, moment).float().cpu()
                for name, parameter in trained_parameters(engine.module).items()
            }
            for name, value in by_name(engine.module, trained).items():
                moments[f"{name}.{moment}"] = value.contiguous()
    return moments


def write_moments(engine: DeepSpeedEngine, moments: dict[str, Tensor], steps: int) -> None:
    """Put full moments, taken after `steps` steps, into a fresh engine. KeyError when one is missing."""
    _create_state(engine)
    with _under_adams_names(engine):
        for moment in MOMENTS:
            named = {name: moments[f"{name}.{moment}"] for name in adapter_parameters(engine.module)}
            values = in_flat(engine.module, named)
            for name, parameter in trained_parameters(engine.module).items():
                safe_set_full_optimizer_state(parameter, values[name].to(engine.device), moment)
    _set_steps(engine, steps)


def _set_steps(engine: DeepSpeedEngine, steps: int) -> None:
    for state in _states(engine):
        if torch.is_tensor(state["step"]):
            state["step"].fill_(steps)
        else:
            state["step"] = steps


def _flat_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's partitions of the master weights: ZeRO-1/2 and ZeRO-3 name them differently."""
    zero = engine.optimizer
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_partitioned_groups_flat)


def _states(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    base = engine.optimizer.optimizer
    return [base.state[flat] for flat in _flat_partitions(engine)]


def _create_state(engine: DeepSpeedEngine) -> None:
    """Optimizers make their state in the first step: take one that changes nothing (no gradient, rate 0)."""
    base = engine.optimizer.optimizer
    group = base.param_groups[0]  # hdl trains one group of parameters
    kept = group["params"], group["lr"]
    group["lr"] = 0.0
    for flat in _flat_partitions(engine):
        group["params"] = [flat]
        flat.grad = torch.zeros_like(flat)
        base.step()
        flat.grad = None
    group["params"], group["lr"] = kept


@contextmanager
def _under_adams_names(engine: DeepSpeedEngine) -> Iterator[None]:
    quantized = [state for state in _states(engine) if "state1" in state]
    for state in quantized:
        for moment, n in zip(MOMENTS, "12"):
            state[moment] = _dequantized(state, n)
    zero = engine.optimizer
    if hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-1/2 reads through per-parameter views
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
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
