"""The optimizer's moments as full float32 tensors per parameter, whatever shards or quantizes them."""

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hdl.adapter.flat import in_flat
from hdl.adapter.lora import adapter_parameters
from hdl.engine.full_state import FullState, places
from hdl.engine.partitions import MOMENTS, set_updates, states, under_adams_names


def named_moments(state: FullState) -> dict[str, Tensor]:
    """`NAME.exp_avg` and `NAME.exp_avg_sq` of every adapter parameter, from what `state` holds."""
    return {f"{name}.{moment}": value for moment in MOMENTS for name, value in state.named(moment).items()}


def read_moments(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """`named_moments` of now, on every rank; every rank must call this."""
    state = FullState(engine, holds=True)
    state.refill().wait()
    return named_moments(state)


@torch.no_grad()
def write_moments(engine: DeepSpeedEngine, moments: dict[str, Tensor], updates: int) -> None:
    """Put full moments, taken after that many updates, into a fresh engine. KeyError when one is missing."""
    rank = dist.get_rank(engine.optimizer.dp_process_group)
    with under_adams_names(engine):
        for moment in MOMENTS:
            named = {name: moments[f"{name}.{moment}"] for name in adapter_parameters(engine.module)}
            values, partitions = in_flat(engine.module, named), [state[moment] for state in states(engine)]
            for name, place in places(engine).items():
                place.put(values[name], partitions, rank)
    set_updates(engine, updates)
