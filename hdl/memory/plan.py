"""What a run will need of a GPU's memory, and how long a step will take, known before it starts.

Every byte has a place in the code, and is counted from the same sizes here:

    weights      the decoder's frozen linears in their form (hdl/kernels/linears.py), and all other weights
    adapter      the flat parameter, its gradient and what gathers it, the float32 copy, the moments
    activations  what the layers keep for backward (KEPT in hdl/kernels/layer.py)
    workspace    what is made and let go while one layer, the head or the optimizer works: the largest of them

A layer that keeps less is recomputed more. `fit` chooses, among all ways to give each layer a level, the one
that costs the least time within a number of bytes. Layers are alike, so what counts is each level's bytes and
milliseconds, and the best mix is of two levels at most.

Times are useful work over measured rates of a GPU (`GPUS`), for launches hidden in graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

from hdl.kernels.attention import rows_for
from hdl.kernels.folded import folded_width
from hdl.kernels.layer import KEPT
from hdl.kernels.linears import padded_rank
from hdl.memory.host import GIB
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
STREAM_STEP = 4  # layers
STREAM_GAIN = 1.1
CONTEXT = 0.4 * GIB  # cuBLASLt's and cuDNN's workspaces, and what is too small to be counted


@dataclass(frozen=True)
class Gpu:
    """Measured rates: TFLOP/s of products in bfloat16 and e4m3 and of attention, TB/s of memory, GB/s from
    page-locked host memory."""

    bf16: float
    fp8: float
    attention: float
    memory: float
    host: float


# tools/bench.py's ceilings and profiles, see docs/measurements.md; the last from an H200.
GPUS = {"h100": Gpu(690, 1230, 380, 2.7, 55), "h200": Gpu(740, 1430, 400, 3.8, 55)}


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
    weights are in host memory (hdl/memory/streaming.py)."""

    weights: str
    keep: tuple[str, ...]
    optimizer: str = "adamw"
    world: int = 1
    master: bool = True
    stream: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes."""

    weights: int
    adapter: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.activations + self.workspace


@dataclass(frozen=True)
class Pack:
    """Linears that share their input, [n, k] together, and the ranks beside them."""

    n: int
    k: int
    r: int

    @property
    def e(self) -> int:
        return folded_width(self.r)


def packs(config: O1Config, rank: int) -> dict[str, Pack]:
    """Of a layer whose seven linears all have an adapter of this rank."""
    d, m = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "qkv": Pack(q + 2 * kv, d, padded_rank(3 * rank)),
        "o": Pack(d, q, padded_rank(rank)),
        "gate_up": Pack(2 * m, d, padded_rank(2 * rank)),
        "down": Pack(d, m, padded_rank(rank)),
    }


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


def block_bytes(pack: Pack, weights: str) -> int:
    """What of a streamed pack comes and goes; its LoRA side stays."""
    numbers = pack.n * pack.k
    if weights == "full":
        return numbers * B16
    return numbers // 2 + numbers // 64 if weights == "nf4" else numbers + pack.n * F32


def weights_bytes(config: O1Config, rank: int, weights: str, stream: int) -> int:
    """What the decoder's linears hold on the GPU, with two slots for the streamed layers."""
    sizes = packs(config, rank).values()
    layer = sum(pack_bytes(p, weights) for p in sizes)
    streamed = sum((p.n + p.k) * p.r * B16 for p in sizes)
    slot = sum(block_bytes(p, weights) for p in sizes)
    return (config.num_hidden_layers - stream) * layer + stream * streamed + min(stream, 2) * slot


def scratch_bytes(config: O1Config, rank: int, weights: str, stream: int) -> int:
    """What all packs share."""
    sizes = packs(config, rank).values()
    if weights == "nf4":
        return max(p.n * p.k for p in sizes) * B16
    if weights == "fp8_once":
        return max(p.k * (p.n + p.e) for p in sizes)
    return max(p.k * p.n for p in sizes) if weights == "fp8" and stream else 0


def adapter_numbers(config: O1Config, rank: int) -> int:
    """Trained numbers, 87.3 M in the real model at rank 32."""
    d, m = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sides = [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]
    return config.num_hidden_layers * rank * sum(i + o for i, o in sides)


def kept_bytes(config: O1Config, rank: int, work: Work, level: str) -> int:
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


def remade_ms(config: O1Config, rank: int, work: Work, level: str, weights: str, gpu: Gpu) -> float:
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


def step_ms(config: O1Config, rank: int, work: Work, strategy: Strategy, gpu: Gpu) -> float:
    """A whole step: products and attention of all layers both ways, the passes between them, LoRA's, and what
    is made anew."""
    s, d, m = work.tokens, config.hidden_size, config.intermediate_size
    p = packs(config, rank)
    products = sum(2 * _product_ms(pack, s, strategy.weights, gpu) for pack in p.values())
    wide = p["qkv"].n + p["gate_up"].n
    # norms, rotary and SwiGLU; LoRA reads every input and every gradient twice
    columns = (2 * d + 2 * p["qkv"].n + 5 * d + 3 * m) + (3 * m + 2 * m + 8 * d + 3 * p["qkv"].n)
    columns += 2 * (3 * d + m) + 2 * (wide + 2 * d)
    columns += (wide + 4 * d + m) // 2 if strategy.weights != "full" else 0  # e4m3 copies, one byte a number
    passes = 1e3 * columns * B16 * s / (gpu.memory * 1e12)
    layer = products + _attention_ms(config, work, gpu) + passes
    again = sum(remade_ms(config, rank, work, level, strategy.weights, gpu) for level in strategy.keep)
    head = 1e-9 * 2 * 3 * work.patches * d * PATCH_DIM / gpu.bf16
    optimizer = 1e3 * adapter_numbers(config, rank) * 32 / (gpu.memory * 1e12)
    computed = config.num_hidden_layers * layer + again + head + optimizer + 3.0  # what starts and ends it
    block = sum(block_bytes(pack, strategy.weights) for pack in p.values())
    moved = max(2 * strategy.stream - 4, 0) * block  # two blocks each way are there already
    return max(computed, 1e3 * moved / (gpu.host * 1e9))


def _product_ms(pack: Pack, tokens: int, weights: str, gpu: Gpu) -> float:
    """One way; forms that are restored first cost a pass over the weight."""
    ms = 1e-9 * 2 * tokens * pack.n * (pack.k + pack.r) / (gpu.fp8 if weights.startswith("fp8") else gpu.bf16)
    if weights == "nf4":
        ms += 1e3 * pack.n * pack.k * 2.5 / (gpu.memory * 1e12)
    if weights == "fp8_once":
        ms += 0.5 * 1e3 * pack.n * pack.k * 2 / (gpu.memory * 1e12)  # backward only
    return ms


def _attention_ms(config: O1Config, work: Work, gpu: Gpu) -> float:
    return 1e-9 * 3.5 * 4 * work.pairs * config.num_attention_heads * config.head_dim / gpu.attention


def need(config: O1Config, rank: int, work: Work, strategy: Strategy) -> Need:
    s, d, m = work.tokens, config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers
    linears = weights_bytes(config, rank, strategy.weights, strategy.stream)
    ends = PATCH_DIM * d // 4 + d // 4 * d + 256 * d + d * d + d * PATCH_DIM + layers * 2 * d
    trained = adapter_numbers(config, rank)
    # the parameter, the gradient a graph writes, the one that is handed on, and DeepSpeed's averaged one
    stepped = OPTIMIZERS[strategy.optimizer] + (F32 if strategy.master else 0)
    adapter = trained * 4 * B16 + int(trained * stepped / strategy.world)
    rows = 1 if strategy.weights.startswith("fp8") else 0  # bytes a number of the e4m3 copies
    # SwiGLU's backward: the gradients that go in and come out, and what else has to be there
    level = min(strategy.keep, key=lambda name: len(KEPT[name]))
    backward = s * ((d + m) * B16 + d * rows + 2 * m * (B16 + rows))
    everything = kept_bytes(config, rank, work, "everything")
    backward += everything - kept_bytes(config, rank, work, level)  # made anew, all at once at worst
    head = min(work.patches, HEAD_CHUNK) * PATCH_DIM * B16 + work.patches * (
        2 * d * B16 + PATCH_DIM * (1 + B16)
    )
    optimizer = trained * F32 // strategy.world  # the gradient in float32
    return Need(
        weights=linears + ends * B16 + scratch_bytes(config, rank, strategy.weights, strategy.stream),
        adapter=adapter,
        activations=sum(kept_bytes(config, rank, work, level) for level in strategy.keep) + 3 * s * d * B16,
        workspace=int(max(backward, head, optimizer) + CONTEXT),
    )


def fit(points: Sequence[tuple[int, float]], layers: int, budget: float) -> list[int] | None:
    """Which of `points`, (bytes, ms) of a level, each layer takes, so that the bytes of all are within the budget
    and the time is the least of all mixes of two levels; None where nothing fits."""
    best: tuple[float, list[int]] | None = None
    for (a, (bytes_a, ms_a)), (b, (bytes_b, ms_b)) in product(enumerate(points), repeat=2):
        if layers * bytes_b > budget or bytes_a < bytes_b:
            continue
        more = (
            layers
            if bytes_a == bytes_b
            else min(layers, int((budget - layers * bytes_b) // (bytes_a - bytes_b)))
        )
        ms = more * ms_a + (layers - more) * ms_b
        if best is None or ms < best[0]:
            best = (ms, [a] * more + [b] * (layers - more))
    return best[1] if best else None


def plan(
    config: O1Config,
    rank: int,
    work: Work,
    weights: str,
    optimizer: str,
    world: int,
    memory: float,
    gpu: Gpu,
    stream: int = 0,
) -> Strategy | None:
    """The fastest levels for this form of weights within `memory` bytes; None where it does not fit."""
    levels = tuple(KEPT)
    layers = config.num_hidden_layers
    points = [
        (kept_bytes(config, rank, work, level), remade_ms(config, rank, work, level, weights, gpu))
        for level in levels
    ]
    # What is made anew in a layer is workspace: the less the leanest level keeps, the more is needed of it.
    found: list[Strategy] = []
    for leanest in range(1, len(levels) + 1):
        worst = Strategy(weights, (levels[leanest - 1],) * layers, optimizer, world, stream=stream)
        rest = need(config, rank, work, worst)
        budget = memory - (rest.peak - layers * points[leanest - 1][0])
        chosen = fit(points[:leanest], layers, budget)
        if chosen:
            keep = tuple(levels[i] for i in chosen)
            found.append(Strategy(weights, keep, optimizer, world, stream=stream))
    return min(found, key=lambda s: step_ms(config, rank, work, s, gpu), default=None)


def mix(keep: Sequence[str]) -> str:
    """In words: "everything x 20, products x 16"."""
    return ", ".join(f"{level} x {len(list(group))}" for level, group in groupby(keep))


@dataclass(frozen=True)
class Choice:
    """A form of weights at its fastest. strategy: None where even its leanest levels do not fit; need: then
    what these would take."""

    weights: str
    strategy: Strategy | None
    need: Need
    ms: float


def choices(
    config: O1Config, rank: int, work: Work, optimizer: str, world: int, memory: float, gpu: Gpu
) -> list[Choice]:
    """Every form of weights within `memory` bytes, the best first, then those that do not fit.

    The best is the fastest, but a plan that streams layers (multiples of STREAM_STEP) has to be faster by
    STREAM_GAIN: what a host's bus gives to a GPU differs.
    """
    found = []
    layers = config.num_hidden_layers

    def ms_of(strategy: Strategy) -> float:
        return step_ms(config, rank, work, strategy, gpu)

    def cost(strategy: Strategy) -> float:
        return ms_of(strategy) * (STREAM_GAIN if strategy.stream else 1.0)

    for weights in FORMS:
        plans = [
            plan(config, rank, work, weights, optimizer, world, memory, gpu, stream)
            for stream in sorted({*range(0, layers, STREAM_STEP), layers})
        ]
        chosen = min((p for p in plans if p), key=cost, default=None)
        leanest = Strategy(weights, ("input",) * layers, optimizer, world, stream=layers)
        taken = chosen or leanest
        found.append(Choice(weights, chosen, need(config, rank, work, taken), ms_of(taken)))
    fitting = sorted((c for c in found if c.strategy), key=lambda c: cost(c.strategy))  # type: ignore[arg-type]
    return fitting + [c for c in found if not c.strategy]


def as_preset(strategy: Strategy) -> dict[str, dict[str, object]]:
    """The strategy in a run's config."""
    levels = set(strategy.keep)
    keep: object = strategy.keep[0] if len(levels) == 1 else list(strategy.keep)
    model = {"weights": strategy.weights, "keep": keep, "stream": strategy.stream}
    return {"model": model, "train": {"optimizer": strategy.optimizer}}
