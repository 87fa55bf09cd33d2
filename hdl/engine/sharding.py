"""DeepSpeed: the optimizer, its schedule, and the engine that shards them by a ds_configs/ file.

The file says how to shard; batch sizes, clipping and precision come from the run's config, so that each
is said once.
"""

import json
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import get_scheduler

from hdl.adapter.flat import flat_parameter
from hdl.config import Train
from hdl.engine.clipping import clip_without_waiting
from hdl.engine.partitions import create_states
from hdl.engine.processes import Processes
from hdl.engine.rounding_adamw import RoundingAdamW
from hdl.errors import HdlError

LARGEST_BUCKET = 200_000_000  # elements
SET_BY_HDL = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


def read_strategy(path: Path) -> dict[str, Any]:
    """A ds_configs/ file; HdlError when it is missing, not JSON, or sets what the run's config sets."""
    try:
        strategy = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HdlError(f"train.deepspeed {path}: no such file; hdl's own are in ds_configs/") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HdlError(f"train.deepspeed {path}: not readable as JSON ({error})") from None
    clash = [key for key in SET_BY_HDL if key in strategy]
    if clash:
        raise HdlError(f"train.deepspeed {path} sets {', '.join(clash)}; set the run's own options instead")
    stage = strategy.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise HdlError(f"train.deepspeed {path}: zero_optimization.stage is {stage}, expected 1, 2 or 3")
    return strategy


def shares(train: Train, world: int) -> tuple[int, int]:
    """(samples a rank packs into one micro-batch, micro-batches a step); HdlError when they come out odd.

    A pack that is filled by tokens counts as one sample.
    """
    if train.batch_packs:
        if train.batch_packs % world:
            raise HdlError(
                f"train.batch_packs {train.batch_packs} is not a multiple of the {world} processes; start with "
                f"train.batch_packs {math.ceil(train.batch_packs / world) * world}, or another number of processes"
            )
        return 1, train.batch_packs // world
    if train.batch_size % world:
        raise HdlError(
            f"train.batch_size {train.batch_size} is not a multiple of the {world} processes; start with "
            f"train.batch_size {math.ceil(train.batch_size / world) * world}, or another number of processes"
        )
    share = train.batch_size // world
    micro = train.micro_batch_size or share
    if share % micro:
        raise HdlError(
            f"train.micro_batch_size {micro} does not divide a rank's share of the batch, {share} "
            f"(batch_size {train.batch_size} over {world} processes)"
        )
    return micro, share // micro


def check_optimizer(train: Train, device: torch.device, dtype: torch.dtype) -> None:
    """HdlError when the optimizer cannot run on this device, or not with this dtype and strategy."""
    if train.optimizer != "adamw" and device.type != "cuda":
        raise HdlError(
            f"train.optimizer {train.optimizer} needs a CUDA GPU, this run is on the CPU; use train.optimizer "
            "adamw"
        )
    zero = read_strategy(train.deepspeed)["zero_optimization"]
    quantized = [name for name in zero if name.startswith("zero_quantized") and zero[name]]
    if quantized:
        raise HdlError(
            f"train.deepspeed {train.deepspeed} sets {quantized[0]}, with which DeepSpeed gives this model 8-bit codes where "
            "it expects weights; to divide 8-bit weights, use model.shard and model.weights fp8 with ds_configs/zero2.json"
        )
    if train.master == "bfloat16":
        reason = None
        if dtype != torch.bfloat16:
            reason = (
                "this run computes in float32, where there is no copy to save; it needs model.dtype bfloat16"
            )
        elif zero["stage"] == 3:
            reason = f"train.deepspeed {train.deepspeed} is ZeRO-3; it needs ZeRO 1 or 2"
        elif (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
            reason = f"train.deepspeed {train.deepspeed} has offload_optimizer; it needs one without"
        if reason:
            raise HdlError(f"train.master bfloat16: {reason}, or use train.master float32")


def build_optimizer(train: Train, parameters: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.master == "bfloat16":
        return RoundingAdamW(parameters, seed=train.seed, rank=rank, **settings)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes import optim  # slow to import and only of use here

    kind = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[train.optimizer]
    return kind(parameters, **settings)


def settings_of(train: Train, dtype: torch.dtype, world: int) -> dict[str, Any]:
    """DeepSpeed's config: the strategy, with what the run's config says."""
    micro, accumulation = shares(train, world)
    in_place = train.master == "bfloat16"
    return read_strategy(train.deepspeed) | {
        "train_batch_size": micro * accumulation * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
        # hdl looks at the loss and the gradient's norm itself; DeepSpeed's own check waits for the GPU
        "bf16": {
            "enabled": dtype == torch.bfloat16,
            "check_grad_overflow": False,
            "bf16_master_weights_and_grads": in_place,
            # the optimizer keeps its moments as it likes; without this, DeepSpeed wants it on the CPU
            "bf16_optimizer_states": in_place,
        },
        "zero_allow_untested_optimizer": True,  # bitsandbytes'
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
    }


def divides_weights(train: Train) -> bool:
    """Whether DeepSpeed divides the frozen weights over the ranks."""
    return bool(read_strategy(train.deepspeed)["zero_optimization"]["stage"] == 3)


def shard(
    model: nn.Module, train: Train, dtype: torch.dtype, processes: Processes
) -> deepspeed.DeepSpeedEngine:
    """Hand the trainable parameters of `model` to DeepSpeed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = settings_of(train, dtype, processes.world)
    zero = settings["zero_optimization"]
    if zero["stage"] == 3:
        # DeepSpeed does so itself, but for a model of which it has divided parts already
        for p in parameters:
            p.data = p.data.to(dtype)
    else:
        zero.setdefault("reduce_bucket_size", bucket_size(model, parameters))
        if processes.world == 1:
            # there is nothing to overlap, and for the right to it every backward waits for the GPU
            zero["overlap_comm"] = False
    optimizer = build_optimizer(train, parameters, processes.rank)
    kind = {"constant": "constant_with_warmup", "cosine": "cosine"}[train.schedule]
    scheduler = get_scheduler(kind, optimizer, train.warmup_steps, train.steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=settings,
        dist_init_required=False,
    )
    if train.master == "bfloat16":
        _step_the_adapter_itself(engine)
    clip_without_waiting(engine)
    create_states(engine)  # now: made between a step's passing things, they would leave memory in pieces
    return engine


def bucket_size(model: nn.Module, parameters: list[nn.Parameter]) -> int:
    """Elements of the bucket in which DeepSpeed gathers gradients before it averages them over the ranks.

    It is allocated anew in every backward pass, and twice where communication overlaps: at DeepSpeed's own 5e8
    elements, 1 to 2 GB beside a decoder whose activations CUDA graphs do not give back. The many small gradients of
    plain modules have to fit; a gradient larger than the bucket, as the flat adapter's, is averaged where it is.
    """
    flat = flat_parameter(model)
    gathered = sum(p.numel() for p in parameters if p is not flat)
    return min(max(gathered, 1), LARGEST_BUCKET)


def _step_the_adapter_itself(engine: deepspeed.DeepSpeedEngine) -> None:
    """DeepSpeed gives the optimizer a copy of this rank's partition even where it has the same dtype: put the
    partition itself in its place."""
    zero = engine.optimizer
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        flat.data = zero.get_bit16_param_group(group)[0]
    zero._link_all_hp_params()  # DeepSpeed's accessors, to the new place
