"""What a run will need of a GPU's memory, and how long a step will take, known before it starts.

Every byte has a place in the code, and is counted from the same sizes here:

    weights      the decoder's frozen linears in their form (hdl/kernels/linears.py), and all other weights
    adapter      the flat parameter, the gradient that graphs write, the float32 copy, the moments, the average
    activations  what the layers keep for backward (KEPT in hdl/kernels/layer.py) and do not send to the host
    workspace    what is made and let go: the most that one layer takes, which stays in the graphs' memory, and
                 beside it the most that the head takes, or the gradient on its way to the optimizer

A layer that keeps less is recomputed more, and needs more room for that. Layers are alike, so what counts is each
level's bytes and milliseconds: a mix of two levels is tried for each pair, as much as fits of the one that keeps
more. Beside it stands what waits in host memory instead (hdl/memory/offload.py), which costs nothing as long as its
copies take no longer than the pass they are in.

Times are useful work over measured rates of a GPU (`GPUS`), for launches hidden in graphs. Forward and backward each
take as long as their own work or their own copies, whichever is longer: a forward pass is a third of the work, but has
as many streamed weights to wait for as a backward pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import NamedTuple

from hdl.kernels.attention import rows_for
from hdl.kernels.folded import folded_width
from hdl.kernels.layer import KEPT
from hdl.kernels.linears import padded_rank
from hdl.memory.host import GIB
from hdl.memory.offload import FEWEST, carried, moved
from hdl.o1.config import O1Config
from hdl.o1.layout import Segment
from hdl.o1.patches import PATCH, PATCH_DIM

B16, F32 = 2, 4  # bytes a number
FORMS = ("full", "fp8", "fp8_once", "nf4")
# Bytes of moments, a trained number.
OPTIMIZERS = {
    "adamw": 2 * F32,
    "adamw_8bit": 2 + 2 * F32 / 256,
    "paged_adamw_8bit": 2 + 2 * F32 / 256,  # they can leave the GPU, but are not counted on to
}
HEAD_CHUNK = 4096  # patches, as in hdl/kernels/head_loss.py
STREAM_STEP = OFFLOAD_STEP = 4  # layers
STREAM_GAIN = 1.1
# cuBLASLt's workspace (64 MiB), PyTorch's cuBLAS workspaces of two streams (32 MiB each), cuDNN's for attention's
# backward (about 70 MB at 4,352 tokens), and what is too small to be counted.
CONTEXT = 0.3 * GIB
FRAGMENTS = 0.045  # of activations: holes among them that nothing fits, where layers' levels differ


@dataclass(frozen=True)
class Gpu:
    """Measured rates: TFLOP/s of products in bfloat16 and e4m3 and of attention, TB/s of memory, GB/s from
    page-locked host memory."""

    bf16: float
    fp8: float
    attention: float
    memory: float
    host: float


# tools/bench.py's ceilings and profiles, and what whole steps took (docs/scaling.md); the last from an H200.
GPUS = {"h100": Gpu(690, 1230, 450, 2.7, 55), "h200": Gpu(680, 1230, 450, 3.6, 55)}


@dataclass(frozen=True)
class Host:
    """A machine: bytes of its memory that can be had, and how many GPUs send their activations there."""

    bytes: float = float("inf")
    gpus: int = 1

    def has(self, need: "Need") -> bool:
        return need.on_host(self.gpus) <= self.bytes


@dataclass(frozen=True)
class Work:
    """One micro-batch on one GPU. tokens: rows of its buffers; patches: image tokens among them; pairs: squares
    of the samples' lengths, added up, which attention's work goes with."""

    tokens: int
    patches: int
    pairs: int

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "Work":
        """Of a pack of these samples, its rows rounded up as a captured pass has them."""
        return cls(
            rows_for(sum(segment.tokens for segment in segments)),
            sum(segment.patches for segment in segments),
            sum(segment.tokens**2 for segment in segments),
        )

    @classmethod
    def of_images(cls, height: int, width: int, images: int, text: int) -> "Work":
        """Pixels of each image, and tokens of each caption."""
        return cls.of([Segment(text, height // PATCH, width // PATCH)] * images)


@dataclass(frozen=True)
class Strategy:
    """weights: of FORMS; keep: a level for each layer; optimizer: of OPTIMIZERS; world: GPUs that share the
    optimizer's state (ZeRO 1 and 2); master: whether it steps a float32 copy of the adapter; stream: layers whose
    weights are in host memory (hdl/memory/streaming.py); offload: layers whose activations wait there; shard: layers
    whose weights are shared out over the GPUs of a machine (hdl/memory/shares.py), `neighbours` of them, in place
    of stream; average: whether one of the adapter is kept (hdl/engine/ema.py)."""

    weights: str
    keep: tuple[str, ...]
    optimizer: str = "adamw"
    world: int = 1
    master: bool = True
    stream: int = 0
    offload: int = 0
    shard: int = 0
    neighbours: int = 1
    average: bool = False

    @property
    def moving(self) -> int:
        """Layers whose weights come and go."""
        return self.stream + self.shard


@dataclass(frozen=True)
class Need:
    """Bytes on a GPU; weights_on_host, activations_on_host: those of a machine, and of each of its GPUs."""

    weights: int
    adapter: int
    activations: int
    workspace: int
    weights_on_host: int = 0
    activations_on_host: int = 0

    @property
    def peak(self) -> int:
        """On the GPU."""
        return self.weights + self.adapter + self.activations + self.workspace

    def on_host(self, gpus: int = 1) -> int:
        return self.weights_on_host + gpus * self.activations_on_host


class Ranks(NamedTuple):
    """Of the adapter of each linear of a layer, on average over the layers where they differ."""

    q: float
    k: float
    v: float
    o: float
    gate: float
    up: float
    down: float


Rank = int | Ranks  # a number: of all seven


def _each(rank: Rank) -> Ranks:
    return Ranks(*[rank] * 7) if isinstance(rank, int) else rank


@dataclass(frozen=True)
class Pack:
    """Linears that share their input, [n, k] together, and the ranks beside them."""

    n: int
    k: int
    r: int

    @property
    def e(self) -> int:
        return folded_width(self.r)


@cache
def packs(config: O1Config, rank: Rank) -> dict[str, Pack]:
    """Of a layer whose seven linears have adapters of this rank, or these."""
    r = _each(rank)
    d, m = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "qkv": Pack(q + 2 * kv, d, padded_rank(ceil(r.q + r.k + r.v))),
        "o": Pack(d, q, padded_rank(ceil(r.o))),
        "gate_up": Pack(2 * m, d, padded_rank(ceil(r.gate + r.up))),
        "down": Pack(d, m, padded_rank(ceil(r.down))),
    }


@cache
def pack_bytes(pack: Pack, weights: str) -> int:
    """What a pack holds on the GPU, LoRA side included."""
    n, k, r, e = pack.n, pack.k, pack.r, pack.e
    if weights == "full":
        return (n + r) * (k + r) * B16
    lora = (n + k) * r * B16
    if weights == "nf4":  # half a byte a number, a byte a block of 64, four a 256 of these
        return lora + n * k // 2 + n * k // 64 + n * k // 64 // 256 * F32
    transposed = k * (e + (n if weights == "fp8" else 0))
    return lora + n * (k + e) + transposed + (n + k + 2 * r) * F32


@cache
def block_bytes(pack: Pack, weights: str) -> int:
    """What of a streamed pack comes and goes; its LoRA side stays."""
    numbers = pack.n * pack.k
    if weights == "full":
        return numbers * B16
    return numbers // 2 + numbers // 64 if weights == "nf4" else numbers + pack.n * F32


@cache
def weights_bytes(config: O1Config, rank: Rank, weights: str, stream: int) -> int:
    """What the decoder's linears hold on the GPU, with two slots for the streamed layers."""
    sizes = packs(config, rank).values()
    layer = sum(pack_bytes(p, weights) for p in sizes)
    streamed = sum((p.n + p.k) * p.r * B16 for p in sizes)
    slot = sum(block_bytes(p, weights) for p in sizes)
    return (config.num_hidden_layers - stream) * layer + stream * streamed + min(stream, 2) * slot


def scratch_bytes(config: O1Config, rank: Rank, weights: str, stream: int) -> int:
    """What all packs share."""
    sizes = packs(config, rank).values()
    if weights == "nf4":
        return max(p.n * p.k for p in sizes) * B16
    if weights == "fp8_once":
        return max(p.k * (p.n + p.e) for p in sizes)
    return max(p.k * p.n for p in sizes) if weights == "fp8" and stream else 0


@cache
def adapter_numbers(config: O1Config, rank: Rank) -> int:
    """Trained numbers, 87.3 M in the real model at rank 32."""
    d, m = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sides = [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]
    return ceil(config.num_hidden_layers * sum(r * (i + o) for r, (i, o) in zip(_each(rank), sides)))


@cache
def kept_bytes(config: O1Config, rank: Rank, work: Work, level: str) -> int:
    """What one layer keeps from forward to backward; its input included."""
    s, d, m = work.tokens, config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    p = packs(config, rank)
    columns = {
        "qkv_in": d + p["qkv"].r,
        "qkv": q + 2 * kv,
        "turned": q + kv,
        "o_in": q + p["o"].r,
        "x1": d,
        "gate_up_in": d + p["gate_up"].r,
        "gate_up": 2 * m,
        "down_in": m + p["down"].r,
    }
    kept = KEPT[level]
    small = F32 * s  # x's statistics; those of the other norm and of attention come with what they belong to
    small += F32 * s if kept & {"x1", "gate_up_in"} else 0
    small += F32 * config.num_attention_heads * s if "o_in" in kept else 0
    return B16 * s * (d + sum(columns[name] for name in kept)) + small


@cache
def remade_ms(config: O1Config, rank: Rank, work: Work, level: str, weights: str, gpu: Gpu) -> float:
    """What a layer's backward spends on making anew what the level does not keep."""
    s, d, m = work.tokens, config.hidden_size, config.intermediate_size
    p = packs(config, rank)
    kept = KEPT[level]
    passed = 0.0  # columns read and written
    passed += 0 if "qkv_in" in kept else 2 * d
    passed += 0 if "turned" in kept else 2 * p["qkv"].n
    passed += 0 if "gate_up_in" in kept else 2 * d
    passed += 0 if "down_in" in kept else m  # stored by the pass that makes its gradient
    passed += 0 if "x1" in kept else 3 * d
    multiplied = (
        ["qkv"] * ("qkv" not in kept) + ["gate_up"] * ("gate_up" not in kept) + ["o"] * ("x1" not in kept)
    )
    ms = 1e3 * passed * B16 * s / (gpu.memory * 1e12)
    ms += sum(_product_ms(p[name], s, weights, gpu) for name in multiplied)
    return ms + (0.0 if "o_in" in kept else _attention_ms(config, work, gpu) / 3.5)


def held_bytes(sizes: Sequence[int], offload: int, working: Sequence[int]) -> tuple[int, int]:
    """What layers that keep so many bytes hold on the GPU at most, when so many of them are offloaded; and the most
    with what each needs beside that while its backward works."""
    moves = _moves(offload, len(sizes))
    here = most = 0
    for size, moved_for in zip(sizes, moves):
        here += size if moved_for is None else size - sizes[moved_for]
        most = max(most, here)
    busiest = 0
    for i in reversed(range(len(sizes))):
        busiest = max(busiest, here + working[i])
        moved_for = moves[i]
        here -= sizes[i] if moved_for is None else sizes[i] - sizes[moved_for]
        most = max(most, here)
    return most, max(most, busiest)


@cache
def _moves(offload: int, layers: int) -> list[int | None]:
    """By layer: which one leaves before it is made, and comes back once it is done with."""
    order = carried(offload, layers)
    changed_for = dict(zip(order[2:], order))
    return [changed_for.get(i) for i in range(layers)]


def sent_bytes(sizes: Sequence[int], offload: int) -> int:
    """What of it goes to host memory and comes back in a step."""
    return sum(sizes[i] for i in carried(offload, len(sizes))[: moved(offload)])


def passes_ms(config: O1Config, rank: Rank, work: Work, strategy: Strategy, gpu: Gpu) -> tuple[float, float]:
    """What all layers compute forward and backward: products and attention, the passes between them, LoRA's, and what
    is made anew."""
    s, d, m = work.tokens, config.hidden_size, config.intermediate_size
    p = packs(config, rank)
    inputs, gradients = 3 * d + m, p["qkv"].n + p["gate_up"].n + 2 * d  # columns of a layer's products
    # norms, rotary and SwiGLU; LoRA reads every input and every gradient twice
    up = 2 * d + 2 * p["qkv"].n + 5 * d + 3 * m + inputs
    down = 3 * m + 2 * m + 8 * d + 3 * p["qkv"].n + inputs + 2 * gradients
    if strategy.weights != "full":  # e4m3 copies, one byte a number
        up, down = up + (inputs - d) // 2, down + gradients // 2
    apart = strategy.moving if strategy.weights != "nf4" else config.num_hidden_layers

    def passed(columns: int) -> float:
        return 1e3 * columns * B16 * s / (gpu.memory * 1e12)

    def multiplied(back: bool) -> float:
        """Of all layers; those whose LoRA is a product of its own write and read its result."""
        of = {
            where: sum(_product_ms(pack, s, strategy.weights, gpu, back, where) for pack in p.values())
            for where in (False, True)
        }
        streamed = strategy.moving
        return (
            (config.num_hidden_layers - streamed) * of[False]
            + streamed * of[True]
            + apart * passed(2 * (inputs if back else gradients))
        )

    layers, attention = config.num_hidden_layers, _attention_ms(config, work, gpu)
    levels = Counter(strategy.keep)
    again = sum(
        n * remade_ms(config, rank, work, level, strategy.weights, gpu) for level, n in levels.items()
    )
    forward = multiplied(back=False) + layers * (attention / 3.5 + passed(up))
    backward = multiplied(back=True) + layers * (attention / 3.5 * 2.5 + passed(down)) + again
    return forward, backward


def step_ms(config: O1Config, rank: Rank, work: Work, strategy: Strategy, gpu: Gpu) -> float:
    """A whole step: both passes, or the copies from and to the host, where they take longer; and what is around."""
    d, p = config.hidden_size, packs(config, rank)
    forward, backward = passes_ms(config, rank, work, strategy, gpu)
    block = sum(block_bytes(pack, strategy.weights) for pack in p.values())
    weights = max(strategy.stream - 2, 0) * block  # two blocks each way are there already
    things = sent_bytes(_sizes(config, rank, work, strategy), strategy.offload)
    head = 1e-9 * 2 * 3 * work.patches * d * PATCH_DIM / gpu.bf16
    optimizer = 1e3 * adapter_numbers(config, rank) * 32 / (gpu.memory * 1e12)

    def copied(size: int) -> float:
        return 1e3 * size / (gpu.host * 1e9)

    both = max(forward, copied(weights), copied(things)) + max(backward, copied(weights + things))
    return both + head + optimizer + 8.0  # what starts and ends it, and the gaps between kernels


def _sizes(config: O1Config, rank: Rank, work: Work, strategy: Strategy) -> list[int]:
    """What each layer keeps."""
    of = {level: kept_bytes(config, rank, work, level) for level in set(strategy.keep)}
    return [of[level] for level in strategy.keep]


def _product_ms(
    pack: Pack, tokens: int, weights: str, gpu: Gpu, back: bool = False, streamed: bool = False
) -> float:
    """One way; nf4 is restored first, e4m3 that is kept once is transposed for the way back."""
    ms = 1e-9 * 2 * tokens * pack.n * (pack.k + pack.r) / (gpu.fp8 if weights.startswith("fp8") else gpu.bf16)
    passes = 2.5 if weights == "nf4" else 0
    if back and (weights == "fp8_once" or (weights == "fp8" and streamed)):
        passes = 2
    return ms + 1e3 * pack.n * pack.k * passes / (gpu.memory * 1e12)


def _attention_ms(config: O1Config, work: Work, gpu: Gpu) -> float:
    return 1e-9 * 3.5 * 4 * work.pairs * config.num_attention_heads * config.head_dim / gpu.attention


@cache
def working_bytes(config: O1Config, rank: Rank, work: Work, level: str, weights: str) -> int:
    """What a layer's backward makes and lets go, at most."""
    s, d, m = work.tokens, config.hidden_size, config.intermediate_size
    rows = 1 if weights.startswith("fp8") else 0  # bytes a number of the e4m3 copies
    # SwiGLU's backward: the gradients that go in and come out, and what else has to be there
    gradients = s * ((d + m) * B16 + d * rows + 2 * m * (B16 + rows))
    everything = kept_bytes(config, rank, work, "everything")
    return gradients + everything - kept_bytes(config, rank, work, level)  # made anew, all at once at worst


def need(config: O1Config, rank: Rank, work: Work, strategy: Strategy) -> Need:
    s, d, layers = work.tokens, config.hidden_size, config.num_hidden_layers
    linears = weights_bytes(config, rank, strategy.weights, strategy.moving)
    ends = PATCH_DIM * d // 4 + d // 4 * d + 256 * d + d * d + d * PATCH_DIM + layers * 2 * d
    trained = adapter_numbers(config, rank)
    stepped = OPTIMIZERS[strategy.optimizer] + F32 * (strategy.master + strategy.average)
    adapter = trained * 2 * B16 + int(trained * stepped / strategy.world)
    head = min(work.patches, HEAD_CHUNK) * PATCH_DIM * B16 + work.patches * (
        2 * d * B16 + PATCH_DIM * (1 + B16)
    )
    # A copy of the gradient is handed on, averaged by DeepSpeed into its own, and that is given to the optimizer in
    # float32. The first is let go before the last is made, but leaves a hole that is too small for it.
    optimizer = trained * B16 + trained * (B16 + (F32 if strategy.master else 0)) // strategy.world
    sizes = _sizes(config, rank, work, strategy)
    of = {level: working_bytes(config, rank, work, level, strategy.weights) for level in set(strategy.keep)}
    held, busiest = held_bytes(sizes, strategy.offload, [of[level] for level in strategy.keep])
    block = sum(block_bytes(pack, strategy.weights) for pack in packs(config, rank).values())
    shares = strategy.shard * block // strategy.neighbours
    return Need(
        weights=linears
        + shares
        + ends * B16
        + scratch_bytes(config, rank, strategy.weights, strategy.moving),
        adapter=adapter,
        activations=int((held + 3 * s * d * B16) * (1 + FRAGMENTS)),
        workspace=int(busiest - held + max(head, optimizer) + CONTEXT),
        weights_on_host=strategy.stream * block,
        activations_on_host=sent_bytes(sizes, strategy.offload),
    )


def plan(
    config: O1Config,
    rank: Rank,
    work: Work,
    weights: str,
    optimizer: str,
    world: int,
    memory: float,
    gpu: Gpu,
    stream: int = 0,
    host: Host = Host(),
    average: bool = False,
) -> Strategy | None:
    """The fastest levels for this form of weights within `memory` bytes of the GPU and what the host has, and how
    many layers' activations to offload; None where it does not fit."""
    layers = config.num_hidden_layers

    def found(base: Strategy, counts: Sequence[int]) -> Iterator[Strategy]:
        for count in counts:
            for keep in _mixes(config, rank, work, replace(base, offload=count), memory):
                candidate = replace(base, offload=count, keep=keep)
                needed = need(config, rank, work, candidate)
                if needed.peak <= memory and host.has(needed):
                    yield candidate

    def ms_of(strategy: Strategy) -> float:
        return step_ms(config, rank, work, strategy, gpu)

    base = Strategy(weights, (), optimizer, world, stream=stream, average=average)
    inside = min(found(base, [0]), key=ms_of, default=None)
    if inside and set(inside.keep) == {"everything"}:
        return inside
    counts = sorted({*range(OFFLOAD_STEP, layers, OFFLOAD_STEP), layers})
    outside = min(found(base, [n for n in counts if n >= FEWEST]), key=_cost(ms_of), default=None)
    return min((s for s in (inside, outside) if s), key=_cost(ms_of), default=None)


def _mixes(
    config: O1Config, rank: Rank, work: Work, base: Strategy, memory: float
) -> Iterator[tuple[str, ...]]:
    """Levels for all layers, some of which may need more memory: one of the offloaded layers, and of the others the
    first at a rich level and the last at a lean one. The other way round what lean layers make anew would come when
    the rich ones' things are gone; but CUDA's memory has more holes then, as measured, than that saves."""
    levels, layers = list(KEPT), config.num_hidden_layers
    order = carried(base.offload, layers)
    others = [i for i in range(layers) if i not in order]
    kept = {level: kept_bytes(config, rank, work, level) for level in levels}

    def mixed(offloaded: str, lean: str, rich: str, count: int) -> tuple[str, ...]:
        keep = [offloaded] * layers
        for n, i in enumerate(others):
            keep[i] = rich if n < count else lean
        return tuple(keep)

    for offloaded in levels if order else levels[:1]:
        for place, lean in enumerate(levels if others else levels[:1]):
            leanest = mixed(offloaded, lean, lean, 0)
            if place == 0:
                yield leanest
            room = memory - need(config, rank, work, replace(base, keep=leanest)).peak
            for rich in levels[:place]:
                count = int(room // ((kept[rich] - kept[lean]) * (1 + FRAGMENTS)))
                if count >= 0:
                    yield mixed(offloaded, lean, rich, min(count, len(others)))


def _cost(ms_of: Callable[[Strategy], float]) -> Callable[[Strategy], float]:
    """A plan that copies weights from the host has to be faster by STREAM_GAIN, and one that copies activations, and
    by both if they share the bus: what it gives differs, and both are seen to slow each other down."""

    def cost(strategy: Strategy) -> float:
        return ms_of(strategy) * STREAM_GAIN ** (bool(strategy.stream) + bool(strategy.offload))

    return cost


def mix(keep: Sequence[str]) -> str:
    """In words, without the order: "everything x 20, products x 16"."""
    return ", ".join(f"{level} x {count}" for level, count in Counter(keep).items())


@dataclass(frozen=True)
class Choice:
    """A form of weights at its fastest. strategy: None where even its leanest levels do not fit; need: then
    what these would take."""

    weights: str
    strategy: Strategy | None
    need: Need
    ms: float


def choices(
    config: O1Config,
    rank: Rank,
    work: Work,
    optimizer: str,
    world: int,
    memory: float,
    gpu: Gpu,
    host: Host = Host(),
    average: bool = False,
) -> list[Choice]:
    """Every form of weights within `memory` bytes of the GPU, the best first, then those that do not fit.

    The best is the fastest, but a plan that streams layers (multiples of STREAM_STEP) has to be faster by STREAM_GAIN,
    and so has one that offloads their activations.
    """
    found = []
    layers = config.num_hidden_layers

    def ms_of(strategy: Strategy) -> float:
        return step_ms(config, rank, work, strategy, gpu)

    cost = _cost(ms_of)
    for weights in FORMS:
        plans = [
            plan(config, rank, work, weights, optimizer, world, memory, gpu, stream, host, average)
            for stream in sorted({*range(0, layers, STREAM_STEP), layers})
        ]
        chosen = min((p for p in plans if p), key=cost, default=None)
        leanest = Strategy(weights, ("input",) * layers, optimizer, world, stream=layers, average=average)
        taken = chosen or leanest
        found.append(Choice(weights, chosen, need(config, rank, work, taken), ms_of(taken)))
    fitting = sorted((c for c in found if c.strategy), key=lambda c: cost(c.strategy))  # type: ignore[arg-type]
    return fitting + [c for c in found if not c.strategy]


def as_preset(strategy: Strategy) -> dict[str, dict[str, object]]:
    """The strategy in a run's config."""
    levels = set(strategy.keep)
    keep: object = strategy.keep[0] if len(levels) == 1 else list(strategy.keep)
    model = {"weights": strategy.weights, "keep": keep}
    model |= {"stream": strategy.stream, "offload": strategy.offload}
    return {"model": model, "train": {"optimizer": strategy.optimizer}}
