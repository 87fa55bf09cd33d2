"""Whether a run fits its GPU, known before a weight is read, and which settings would make it fit.

The plan (hdl/memory/plan.py) is asked about the heaviest micro-batch that the data can give. It counts the fused
path; plain modules, whose memory depends on what PyTorch and PEFT keep, are not foreseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hdl.config import Run
from hdl.data.samples import SampleInfo
from hdl.engine.processes import Processes
from hdl.engine.sharding import shares
from hdl.errors import HdlError
from hdl.kernels.backend import has_fp8
from hdl.memory.plan import GIB, GPUS, OPTIMIZERS, Strategy, Work, choices, mix, need
from hdl.o1.config import O1Config
from hdl.o1.layout import Segment

MARGIN = 1.05  # a run is refused when it is expected to take that many times what there is
LEANER = 0.9  # of what there is, for a plan after one that took too much
RESERVED = GIB  # of a card, for others


@dataclass(frozen=True)
class Budget:
    """bytes: what the run may take; fp8: whether the GPU multiplies in it."""

    bytes: float
    fp8: bool


def budget_of(run: Run, device: torch.device, fp8: bool) -> Budget:
    """Of this process's GPU, or of the smaller card that model.card imitates, to which the allocator is then held.

    HdlError when the GPU is smaller than model.card.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    if run.model.card is None:
        return Budget(total - RESERVED, fp8)
    wanted = run.model.card * GIB - RESERVED
    if wanted > total:
        raise HdlError(
            f"model.card {run.model.card:g} GiB: this GPU has {total / GIB:.1f}; leave model.card out to use all of it"
        )
    torch.cuda.set_per_process_memory_fraction(wanted / total, device)
    return Budget(wanted, fp8)


def settled(
    run: Run, config: O1Config, infos: Sequence[SampleInfo], processes: Processes, fuses: bool
) -> tuple[Run, str | None]:
    """`settle` with this process's GPU; the run as it is, and nothing to say, where nothing can be foreseen.

    fuses: whether the decoder takes the fused path. HdlError for what needs that path, or a GPU.
    """
    device = processes.device
    if device.type == "cuda" and fuses:
        return settle(run, config, infos, processes.world, budget_of(run, device, has_fp8(device)))
    for option, found, without in (("memory", run.model.memory, "set"), ("card", run.model.card, None)):
        if found != without:
            lacking = "this run takes the plain path" if device.type == "cuda" else "this run is on the CPU"
            raise HdlError(
                f"model.{option} {found} plans the fused path on a GPU, and {lacking}; leave it out"
            )
    return run, None


def advice(run: Run, config: O1Config, infos: Sequence[SampleInfo], processes: Processes) -> str:
    """What to try after a run took more memory than there is."""
    usual = "lower train.micro_batch_size, the images' area or lora.rank"
    if processes.device.type != "cuda":
        return usual
    budget = budget_of(run, processes.device, has_fp8(processes.device))
    micro, _ = shares(run.train, processes.world)
    try:
        leaner = Budget(LEANER * budget.bytes, budget.fp8)
        return f"try {_described(_fastest(run, config, heaviest(infos, micro), processes.world, leaner))}; or {usual}"
    except HdlError:
        return usual


def settle(
    run: Run, config: O1Config, infos: Sequence[SampleInfo], world: int, budget: Budget
) -> tuple[Run, str]:
    """The run with model.memory carried out, and what to expect of it in one line.

    HdlError with the nearest settings that fit when the run's own do not, or when none do.
    """
    micro, _ = shares(run.train, world)
    work = heaviest(infos, micro)
    if run.model.memory == "auto":
        run = _fastest(run, config, work, world, budget)
    strategy = strategy_of(run, config, world)
    needed = need(config, run.lora.rank, work, strategy)
    if needed.peak > MARGIN * budget.bytes:
        fastest = _fastest(run, config, work, world, budget)
        raise HdlError(
            f"this run needs about {needed.peak / GIB:.1f} GiB ({_parts(run, config, work, strategy)}) and may take "
            f"{budget.bytes / GIB:.1f}; the fastest that fits: {_described(fastest)}. Set it, or model.memory auto"
        )
    return run, (
        f"memory: about {needed.peak / GIB:.1f} of {budget.bytes / GIB:.1f} GiB expected with {_described(run)}: "
        f"{_parts(run, config, work, strategy)}"
    )


def heaviest(infos: Sequence[SampleInfo], micro: int) -> Work:
    """The micro-batch with the most tokens that these samples can make."""
    longest = sorted(infos, key=lambda i: i.patches + max(i.text_tokens), reverse=True)
    segments = [Segment(max(i.text_tokens), i.rows, i.cols) for i in longest[:micro]]
    while len(segments) < micro:  # samples come again
        segments += segments[: micro - len(segments)]
    return Work.of(segments)


def strategy_of(run: Run, config: O1Config, world: int) -> Strategy:
    keep, layers = run.model.keep, config.num_hidden_layers
    levels = (keep,) * layers if isinstance(keep, str) else tuple(keep)
    master = run.train.master == "float32"
    return Strategy(run.model.weights, levels, run.train.optimizer, world, master, run.model.stream)


def _fastest(run: Run, config: O1Config, work: Work, world: int, budget: Budget) -> Run:
    """The run with the weights, levels and optimizer of the fastest plan that fits: with its own optimizer, or
    else with another one."""
    least: float = float("inf")
    for optimizer in (run.train.optimizer, *(o for o in OPTIMIZERS if o != run.train.optimizer)):
        found = choices(config, run.lora.rank, work, optimizer, world, budget.bytes, GPUS["h100"])
        usable = [c for c in found if budget.fp8 or not c.weights.startswith("fp8")]
        best = usable[0]
        if best.strategy:
            levels = best.strategy.keep
            keep = levels[0] if len(set(levels)) == 1 else list(levels)
            stream = best.strategy.stream
            model = run.model.model_copy(update={"weights": best.weights, "keep": keep, "stream": stream})
            train = run.train.model_copy(update={"optimizer": optimizer})
            return run.model_copy(update={"model": model, "train": train})
        least = min(least, *(c.need.peak for c in usable))
    raise HdlError(
        f"no settings of weights, recomputation and optimizer fit {budget.bytes / GIB:.1f} GiB: the least is "
        f"{least / GIB:.1f} GiB for {work.tokens} tokens a micro-batch at LoRA rank {run.lora.rank}; lower "
        "train.micro_batch_size, the images' area or lora.rank"
    )


def _described(run: Run) -> str:
    keep = run.model.keep
    levels = keep if isinstance(keep, str) else mix(keep)
    streamed = f"model.stream {run.model.stream}, " if run.model.stream else ""
    return f"model.weights {run.model.weights}, {streamed}model.keep {levels}, train.optimizer {run.train.optimizer}"


def _parts(run: Run, config: O1Config, work: Work, strategy: Strategy) -> str:
    parts = vars(need(config, run.lora.rank, work, strategy))
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
