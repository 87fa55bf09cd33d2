"""How a step grows with the number of GPUs: what each computes, and what it waits for others for.

    step = forward + backward + rest      of one GPU by itself (hdl/memory/plan.py)
         + gathers that stay visible      of weights that are shared out within a machine (hdl/memory/shares.py)
         + slowed                         what computes beside a gather, which takes some of the GPU from it
         + gradient                       all-reduce of the adapter's gradient, all-gather of its new values: nothing is
                                          left to compute beside them, since the adapter is one flat parameter
         + waiting                        of a rank for the slowest one

Layers are alike. A gather is queued when its slot is left, one visit before it is needed, and gathers follow one another, so
a layer takes as long as its computing or its gather, whichever is longer: a pass of m layers gathers m - 2 of them, and
shows (m - 2) max(0, gather - layer). Rings: n GPUs that reduce B bytes each send and receive 2 (n - 1) / n B, and
that gather B bytes (n - 1) / n B. Between machines, what goes on wires that all GPUs of a machine share is counted once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hdl.memory.plan import (
    B16,
    Gpu,
    Strategy,
    Work,
    adapter_numbers,
    block_bytes,
    packs,
    passes_ms,
    step_ms,
)
from hdl.o1.config import O1Config

# Fitted to steps of one, two and four H100s, or assumed; see docs/scaling.md.
NVLINK = 250.0  # GB/s that a ring carries for each GPU between those of one machine (H100: 450 one way in hardware)
WIRE = 0.85  # of a network's rate that arrives
LATENCY = 0.03  # ms of a collective within a machine, and of each step of a ring between machines
SLOWED = 0.16  # of a layer's speed, while a gather runs beside it: NCCL's 16 blocks on 132 multiprocessors, and memory
WAITING = 5.4  # ms of two ranks for each other


@dataclass(frozen=True)
class Cluster:
    """machines of `gpus` each; wire: Gb/s of a machine to the others."""

    gpus: int
    machines: int = 1
    wire: float = 0.0
    nvlink: float = NVLINK

    @property
    def world(self) -> int:
        return self.gpus * self.machines

    def ring_ms(self, size: float, rounds: int) -> float:
        """size bytes, of which each GPU has or wants an equal part, once around all GPUs; rounds: 2 to reduce
        and hand out, 1 to gather."""
        n, m = self.gpus, self.machines
        inside = 0.0 if n == 1 else LATENCY + 1e-6 * size * rounds * (n - 1) / n / self.nvlink
        if m == 1:
            return inside
        wire = self.wire / 8 * WIRE
        return inside + rounds * (m - 1) * LATENCY + 1e-6 * size * rounds * (m - 1) / m / wire


@dataclass(frozen=True)
class Step:
    """ms; waiting: between what it is if it stays that of two ranks and if it grows as the latest of many does."""

    computed: float
    gathered: float  # all gathers by themselves
    visible: float
    slowed: float
    gradient: float
    waiting: tuple[float, float]

    @property
    def ms(self) -> tuple[float, float]:
        """At best and at worst."""
        shared = self.computed + self.visible + self.slowed + self.gradient
        return shared + self.waiting[0], shared + self.waiting[1]


def step(
    config: O1Config, rank: int, work: Work, strategy: Strategy, cluster: Cluster, gpu: Gpu,
    *, across: bool = False,
) -> Step:  # fmt: skip
    """One step of every GPU with such work. strategy.shard: layers that are shared out, over a machine, or `across` all
    of them, which hdl does not do."""
    layers = config.num_hidden_layers
    computed = step_ms(config, rank, work, strategy, gpu)
    block = sum(block_bytes(pack, strategy.weights) for pack in packs(config, rank).values())
    gather = (cluster if across else Cluster(cluster.gpus, nvlink=cluster.nvlink)).ring_ms(block, 1)
    count = max(strategy.shard - 2, 0)
    visible = sum(
        count * max(0.0, gather - way / layers) for way in passes_ms(config, rank, work, strategy, gpu)
    )
    gathered = 2 * count * gather
    adapter = adapter_numbers(config, rank) * B16
    gradient = 0.0 if cluster.world == 1 else cluster.ring_ms(adapter, 2) + cluster.ring_ms(adapter, 1)
    return Step(
        computed, gathered, visible, SLOWED * (gathered - visible), gradient, waiting_ms(cluster.world)
    )


def waiting_ms(world: int) -> tuple[float, float]:
    """Of a rank for the latest of `world`."""
    return (0.0, 0.0) if world == 1 else (WAITING, WAITING * latest_of(world) / latest_of(2))


def latest_of(count: int) -> float:
    """How far the largest of so many normally distributed numbers lies above their mean on average, in deviations."""
    width, most = 1e-3, 8.0
    points = [-most + width * i for i in range(int(2 * most / width))]
    below = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in points]
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in points]
    return width * sum(x * count * b ** (count - 1) * d for x, b, d in zip(points, below, density))


def clusters(nvlink: float = NVLINK) -> dict[str, Cluster]:
    """Those that are predicted; nvlink: GB/s."""
    return {
        "1": Cluster(1, nvlink=nvlink),
        "2": Cluster(2, nvlink=nvlink),
        "8": Cluster(8, nvlink=nvlink),
        "4 x 8, 400 Gb/s": Cluster(8, 4, 400, nvlink),
        "4 x 8, 100 Gb/s": Cluster(8, 4, 100, nvlink),
    }


def table(
    config: O1Config, rank: int, work: Work, images: int, gpu: Gpu, named: Mapping[str, Cluster]
) -> list[str]:
    """Markdown: every cluster in bf16 and e4m3, whole on every GPU and shared out; images: of a GPU's step."""
    lines = [
        "| weights | GPUs | step ms | images/s | of one GPU each | gathers ms | visible | slowed | gradient ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for form in ("full", "fp8"):
        for shared in (False, True):
            alone = step(config, rank, work, _strategy(config, form, Cluster(1), False), Cluster(1), gpu).ms[
                0
            ]
            for name, cluster in named.items():
                if shared and cluster.world == 1:
                    continue
                found = step(config, rank, work, _strategy(config, form, cluster, shared), cluster, gpu)
                best, worst = found.ms
                low, high = (cluster.world * images * 1e3 / ms for ms in (worst, best))
                gathers = [found.gathered, found.visible, found.slowed] if shared else []
                of_gathers = " | ".join(f"{ms:.1f}" for ms in gathers) or "- | - | -"
                lines.append(
                    f"| {form}{', sharded' if shared else ''} | {name} | {_range(best, worst, '.0f')} | "
                    f"{_range(low, high, '.1f')} | {_range(100 * alone / worst, 100 * alone / best, '.0f')} % | {of_gathers} | "
                    f"{found.gradient:.1f} |"
                )
    return lines


def _strategy(config: O1Config, form: str, cluster: Cluster, shared: bool) -> Strategy:
    layers = config.num_hidden_layers
    return Strategy(
        form, ("everything",) * layers, world=cluster.world, shard=layers if shared else 0, neighbours=cluster.gpus
    )  # fmt: skip


def _range(low: float, high: float, form: str) -> str:
    texts = f"{low:{form}}", f"{high:{form}}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
