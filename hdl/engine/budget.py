"""Whether a run fits its GPU, known before a weight is read, and which settings would make it fit.

The plan (hdl/memory/plan.py) is asked about the heaviest micro-batch that the data can give. It counts the fused
path; plain modules, whose memory depends on what PyTorch and PEFT keep, are not foreseen.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hdl.adapter.names import DECODER
from hdl.adapter.patterns import value_of
from hdl.config import Lora, Run, Train
from hdl.data.samples import SampleInfo
from hdl.engine.fast_path import check_layers
from hdl.engine.processes import Processes
from hdl.engine.sharding import shares
from hdl.errors import HdlError
from hdl.kernels.backend import has_fp8
from hdl.memory.host import available
from hdl.memory.plan import GIB, GPUS, OPTIMIZERS, Host, Ranks, Strategy, Work, choices, mix, need
from hdl.o1.config import O1Config
from hdl.o1.layout import Segment

MARGIN = 1.05  # a run is refused when it is expected to take that many times what there is
LEANER = 0.9  # of what there is, for a plan after one that took too much
RESERVED = GIB  # of a card, for others


@dataclass(frozen=True)
class Budget:
    """bytes: what the run may take; fp8: whether the GPU multiplies in it; host: of the machine's own memory."""

    bytes: float
    fp8: bool
    host: Host = field(default_factory=Host)


def budget_of(run: Run, device: torch.device, fp8: bool) -> Budget:
    """Of this process's GPU, or of the smaller card that model.card imitates, to which the allocator is then held.

    HdlError when the GPU is smaller than model.card.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    host = Host(available()[0], int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if run.model.card is None:
        return Budget(total - RESERVED, fp8, host)
    wanted = run.model.card * GIB - RESERVED
    if wanted > total:
        raise HdlError(
            f"model.card {run.model.card:g} GiB: this GPU has {total / GIB:.1f}; leave model.card out to use all of it"
        )
    torch.cuda.set_per_process_memory_fraction(wanted / total, device)
    return Budget(wanted, fp8, host)


def settled(
    run: Run,
    config: O1Config,
    infos: Sequence[SampleInfo],
    processes: Processes,
    fuses: bool,
    beside: int = 0,
) -> tuple[Run, str | None]:
    """`settle` with this process's GPU; the run as it is, and nothing to say, where nothing can be foreseen.

    fuses: whether the decoder takes the fused path. beside: bytes that something else of this run takes there.
    HdlError for what needs that path, or a GPU.
    """
    device = processes.device
    check_layers(run, config)
    if device.type == "cuda" and fuses:
        budget = budget_of(run, device, has_fp8(device))
        return settle(run, config, infos, processes.world, replace(budget, bytes=budget.bytes - beside))
    for option, found, without in (("memory", run.model.memory, "set"), ("card", run.model.card, None)):
        if found != without:
            lacking = "this run takes the plain path" if device.type == "cuda" else "this run is on the CPU"
            raise HdlError(
                f"model.{option} {found} plans the fused path on a GPU, and {lacking}; leave it out"
            )
    return run, None


def advice(run: Run, config: O1Config, infos: Sequence[SampleInfo], processes: Processes) -> str:
    """What to try after a run took more memory than there is."""
    size = "micro_batch_tokens" if run.train.micro_batch_tokens else "micro_batch_size"
    usual = f"lower train.{size}, the images' area or lora.rank"
    if processes.device.type != "cuda":
        return usual
    budget = budget_of(run, processes.device, has_fp8(processes.device))
    work = work_of(run.train, infos, processes.world)
    try:
        leaner = replace(budget, bytes=LEANER * budget.bytes)
        return f"try {_described(_fastest(run, config, work, processes.world, leaner))}; or {usual}"
    except HdlError:
        return usual


def settle(
    run: Run, config: O1Config, infos: Sequence[SampleInfo], world: int, budget: Budget
) -> tuple[Run, str]:
    """The run with model.memory carried out, and what to expect of it in one line.

    HdlError with the nearest settings that fit when the run's own do not, or when none do.
    """
    work = work_of(run.train, infos, world)
    if run.model.memory == "auto":
        run = _fastest(run, config, work, world, budget)
    strategy = strategy_of(run, config, world)
    needed = need(config, mean_ranks(run.lora, config), work, strategy)
    if needed.peak > MARGIN * budget.bytes:
        fastest = _fastest(run, config, work, world, budget)
        raise HdlError(
            f"this run needs about {needed.peak / GIB:.1f} GiB ({_parts(run, config, work, strategy)}) and may take "
            f"{budget.bytes / GIB:.1f}; the fastest that fits: {_described(fastest)}. Set it, or model.memory auto"
        )
    if not budget.host.has(needed):
        raise HdlError(
            f"model.stream {run.model.stream} and model.offload {run.model.offload} keep "
            f"{needed.on_host(budget.host.gpus) / GIB:.1f} GiB in host memory for {budget.host.gpus} GPU(s), of which "
            f"{budget.host.bytes / GIB:.1f} can be had; lower them, or set model.memory auto"
        )
    return run, (
        f"memory: about {needed.peak / GIB:.1f} of {budget.bytes / GIB:.1f} GiB expected with {_described(run)}: "
        f"{_parts(run, config, work, strategy)}"
    )


def mean_ranks(lora: Lora, config: O1Config) -> Ranks:
    """Of each of the seven linears, the mean of its ranks over the layers: what memory is planned with.

    Sums over the layers are exact by it, but for the padding of ranks to multiples of 8; a layer with larger ranks
    than the mean works in a few MB more.
    """
    layers = range(config.num_hidden_layers)
    names = [[f"model.language_model.layers.{layer}.{linear}" for layer in layers] for linear in DECODER]
    return Ranks(*(sum(value_of(lora.rank_pattern, n, lora.rank) for n in of) / len(of) for of in names))


def work_of(train: Train, infos: Sequence[SampleInfo], world: int) -> Work:
    """The heaviest micro-batch of a run, of which these are the largest samples."""
    if train.micro_batch_tokens:
        return fullest(infos, train.micro_batch_tokens)
    micro, _ = shares(train, world)
    return heaviest(infos, micro)


def fullest(infos: Sequence[SampleInfo], tokens: int) -> Work:
    """The heaviest pack of so many tokens: nothing but the longest of these samples, as far as it goes in."""
    segment = max((_segment(info) for info in infos), key=lambda segment: segment.tokens)
    segments = [segment] * (tokens // segment.tokens)
    rest = tokens % segment.tokens
    return Work.of([*segments, Segment(2, 1, rest - 2)] if rest > 2 else segments)


def heaviest(infos: Sequence[SampleInfo], micro: int) -> Work:
    """The micro-batch with the most tokens that these samples can make."""
    segments = sorted((_segment(info) for info in infos), key=lambda segment: -segment.tokens)[:micro]
    while len(segments) < micro:  # samples come again
        segments += segments[: micro - len(segments)]
    return Work.of(segments)


def _segment(info: SampleInfo) -> Segment:
    """A sample with its longest prompt."""
    return Segment(info.longest_text, info.rows, info.cols, tuple(info.references))


def strategy_of(run: Run, config: O1Config, world: int) -> Strategy:
    keep, layers = run.model.keep, config.num_hidden_layers
    levels = (keep,) * layers if isinstance(keep, str) else tuple(keep)
    master = run.train.master == "float32"
    model = run.model
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Strategy(
        model.weights, levels, run.train.optimizer, world, master, model.stream, model.offload, model.shard, neighbours, run.train.ema > 0
    )  # fmt: skip


def _fastest(run: Run, config: O1Config, work: Work, world: int, budget: Budget) -> Run:
    """The run with the weights, levels and optimizer of the fastest plan that fits: with its own optimizer, or
    else with another one."""
    least: float = float("inf")
    ranks = mean_ranks(run.lora, config)
    for optimizer in (run.train.optimizer, *(o for o in OPTIMIZERS if o != run.train.optimizer)):
        gpu = GPUS["h100"]
        found = choices(
            config, ranks, work, optimizer, world, budget.bytes, gpu, budget.host, run.train.ema > 0
        )
        usable = [c for c in found if budget.fp8 or not c.weights.startswith("fp8")]
        best = usable[0]
        if best.strategy:
            levels = best.strategy.keep
            keep = levels[0] if len(set(levels)) == 1 else list(levels)
            chosen = {"stream": best.strategy.stream, "offload": best.strategy.offload, "shard": 0}
            model = run.model.model_copy(update={"weights": best.weights, "keep": keep, **chosen})
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
    sharded = f"model.shard {run.model.shard}, " if run.model.shard else ""
    offloaded = f"model.offload {run.model.offload}, " if run.model.offload else ""
    return (
        f"model.weights {run.model.weights}, {streamed}{sharded}model.keep {levels}, {offloaded}train.optimizer "
        f"{run.train.optimizer}"
    )


def _parts(run: Run, config: O1Config, work: Work, strategy: Strategy) -> str:
    parts = vars(need(config, mean_ranks(run.lora, config), work, strategy))
    return ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.1f}"
        for name, size in parts.items()
        if size or not name.endswith("_on_host")
    )
