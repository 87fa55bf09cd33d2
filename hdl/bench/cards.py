"""Settings to train with in the memory of a smaller card: the issue's rows, and random ones to hold the plan to.

A row is planned as `model.memory auto` does it, on what its card may take (1 GiB less than it has). What it is compared to
is the same form of weights with everything resident and kept, on the whole GPU; a row that streams weights is also
compared to the same linears where they are, which is what its step computes.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hdl.config import Lora, Model, Run, Train
from hdl.kernels.layer import KEPT
from hdl.memory.plan import FORMS, GIB, Gpu, Host, Need, Strategy, Work, choices, mix, need, step_ms
from hdl.o1.config import O1Config
from hdl.o1.layout import Segment
from hdl.o1.patches import PATCH

RESERVED = 1.0  # GiB of a card, for others
TEXT = 160  # tokens


@dataclass(frozen=True)
class Row:
    """GiB of the card, pixels of a side, images a step; bound: GiB that may be reserved; ratio: of step times, wanted
    at most."""

    card: float
    side: int
    images: int
    bound: float
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.card:g}gb-{self.side}x{self.images}"


ROWS = (
    Row(24, 2048, 1, 23, 1.10),
    Row(24, 1024, 4, 23, 1.10),
    Row(16, 2048, 1, 15, 1.25),
    Row(12, 1024, 1, 11, 1.25),
    Row(12, 2048, 1, 11, 1.50),
    Row(8, 1024, 1, 7, 1.50),
)


@dataclass(frozen=True)
class Setting:
    """One way to train. height, width: pixels; text: tokens of each caption; card: GiB, of which the allocator may take
    1 less; None: all of the GPU. in_place: streamed layers' linears stay where they are."""

    height: int
    width: int
    images: int
    rank: int
    weights: str
    keep: tuple[str, ...]
    stream: int = 0
    offload: int = 0
    optimizer: str = "adamw"
    text: int = TEXT
    card: float | None = None
    in_place: bool = False

    @property
    def segments(self) -> list[Segment]:
        return [Segment(self.text, self.height // PATCH, self.width // PATCH)] * self.images

    @property
    def work(self) -> Work:
        return Work.of(self.segments)

    @property
    def strategy(self) -> Strategy:
        return Strategy(self.weights, self.keep, self.optimizer, stream=self.stream, offload=self.offload)

    def need(self, config: O1Config) -> Need:
        return need(config, self.rank, self.work, self.strategy)

    def ms(self, config: O1Config, gpu: Gpu) -> float:
        return step_ms(config, self.rank, self.work, self.strategy, gpu)

    def run(self, base: Path, cache: Path | None, random_init: bool) -> Run:
        """The config of a run that trains so."""
        model = Model(
            base=base, random_init=random_init, kernels="fused", weights=self.weights, stream=self.stream,
            keep=list(self.keep), offload=self.offload, cache=None if self.weights == "full" else cache,
        )  # type: ignore[arg-type]  # fmt: skip
        train = Train(batch_size=self.images, warmup_steps=0, optimizer=self.optimizer)  # type: ignore[arg-type]
        lora = Lora(rank=self.rank, alpha=self.rank)
        return Run.model_construct(model=model, lora=lora, train=train)

    def words(self) -> str:
        parts = [self.weights, f"stream {self.stream}" * bool(self.stream), mix(self.keep)]
        parts += [f"offload {self.offload}" * bool(self.offload), self.optimizer]
        size = f"{self.images} x {self.width}x{self.height}, {self.text} text tokens, rank {self.rank}"
        return f"{size}: {', '.join(part for part in parts if part)}{', in place' * self.in_place}"

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"keep": list(self.keep)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> "Setting":
        return cls(**data | {"keep": tuple(data["keep"])})


def planned(
    row: Row,
    config: O1Config,
    rank: int,
    gpu: Gpu,
    host: Host,
    memory: float | None = None,
    spare: float = 0.0,
) -> Setting:
    """The fastest that fits the row's card, or `memory` bytes; spare: GiB of the card that the plan leaves while the
    allocator could take them. ValueError where nothing does."""
    bare = Setting(row.side, row.side, row.images, rank, "full", (), card=None if memory else row.card)
    allowed = memory or (row.card - RESERVED - spare) * GIB
    best = choices(config, rank, bare.work, bare.optimizer, 1, allowed, gpu, host)[0].strategy
    if best is None:
        raise ValueError(f"{row.name}: nothing fits")
    return replace(bare, weights=best.weights, keep=best.keep, stream=best.stream, offload=best.offload)


def reference(setting: Setting) -> Setting:
    """The same weights, all resident and everything kept, on the whole GPU."""
    return replace(setting, keep=("everything",) * len(setting.keep), stream=0, offload=0, card=None)


def standing(setting: Setting) -> Setting:
    """What a setting that streams weights computes, with nothing on its way."""
    return replace(setting, offload=0, card=None, in_place=True)


def random_settings(
    count: int,
    seed: int,
    config: O1Config,
    largest: int,
    memory: float,
    host: float,
    forms: Sequence[str] = FORMS,
) -> list[Setting]:
    """Of all forms in turn, with sides of up to `largest` pixels, expected within `memory` bytes of the GPU and
    `host` of its machine. Paged moments are left out: the plan counts them, PyTorch's allocator does not."""
    chance = random.Random(seed)
    layers = config.num_hidden_layers
    found: list[Setting] = []
    while len(found) < count:
        height, width = (PATCH * chance.randint(largest // PATCH // 4, largest // PATCH) for _ in range(2))
        levels = chance.sample(list(KEPT), chance.randint(1, len(KEPT)))
        setting = Setting(
            height=height,
            width=width,
            images=chance.randint(1, 4),
            rank=chance.choice([4, 8, 16, 32, 64, 128]),
            weights=forms[len(found) % len(forms)],
            keep=tuple(chance.choice(levels) for _ in range(layers)),
            stream=chance.choice([0, chance.randint(1, layers)]),
            offload=chance.choice([0, chance.randint(3, layers)]),
            optimizer=chance.choice(["adamw", "adamw_8bit"]),
            text=chance.randint(20, 400),
        )
        needed = setting.need(config)
        if needed.peak <= memory and needed.on_host() <= host:
            found.append(setting)
    return found
