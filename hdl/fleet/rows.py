"""What is measured of a machine with several GPUs: the rows of the table, most important first, each a run of the trainer.

A row is one way to share a model out over the GPUs (`strategy`), one form of its frozen weights and one kind of data.
Every GPU has the same work in all rows of a kind of data, so that images a second and GPU can be held against each other.
No import here takes time: the process that looks after the others reads this file, too.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "hdl" / "mini" / "o1-mini"
CONFIG_8B = ROOT / "tests" / "o1" / "o1-8b-config.json"
CARD = ROOT / "launch" / "presets" / "8x24gb.toml"

ZERO2, SHARDED, ZERO3, PRESET = "ZeRO-2", "sharded", "DeepSpeed ZeRO-3", "8x24gb preset"
EQUAL, MIXED = "1024x4", "mixed"
FULL, FP8, PLANNED = "full", "fp8", "planned"  # planned: what the preset's plan chooses
IMAGES = 4  # of a GPU's step; of a mixed one on average
STEPS, FEW = 12, 6
MANY = 30  # of mixed data, whose first steps capture graphs and race products, on one rank or another


@dataclass(frozen=True)
class Size:
    """layers: of the model, all of which are shared out in a sharded row; rank: of the LoRA; side: pixels of a square
    image, or of the square of a mixed one's area; text: tokens of an equal image's caption; texts: fewest and most of a
    mixed one's; pack: tokens of a mixed forward, about those of IMAGES mixed ones."""

    layers: int
    rank: int
    side: int
    mixed_side: int
    text: int
    texts: tuple[int, int]
    pack: int


FULL_SIZE = Size(36, 32, 1024, 1024, 160, (20, 400), 5120)
TINY_SIZE = Size(6, 4, 64, 128, 40, (24, 48), 208)


def size_of(tiny: bool) -> Size:
    return TINY_SIZE if tiny else FULL_SIZE


@dataclass(frozen=True)
class Row:
    gpus: int
    strategy: str
    weights: str
    data: str = EQUAL

    @property
    def name(self) -> str:
        """Of its files."""
        parts = (f"{self.gpus}gpu", self.strategy, self.weights, self.data)
        return "-".join(parts).replace(" ", "_").lower()

    @property
    def steps(self) -> int:
        return FEW if self.strategy == ZERO3 else MANY if self.data == MIXED else STEPS


def rows_of_all(gpus: int) -> list[Row]:
    """On all GPUs of the machine. DeepSpeed's ZeRO-3 comes last: it keeps its model for as long as the process lasts."""
    both = [(strategy, weights) for weights in (FULL, FP8) for strategy in (ZERO2, SHARDED)]
    return [
        *(Row(gpus, *pair, data) for data in (EQUAL, MIXED) for pair in both),
        Row(gpus, PRESET, PLANNED),
        Row(gpus, ZERO3, FULL),
    ]


def rows_of_part(gpus: int) -> list[Row]:
    """On one or two of a machine's GPUs, for all to be held against."""
    strategies = (ZERO2,) if gpus == 1 else (ZERO2, SHARDED)
    return [Row(gpus, strategy, weights) for weights in (FULL, FP8) for strategy in strategies]


def parts_of(gpus: int) -> list[int]:
    """GPUs of each part, which are measured at the same time, on GPUs of their own."""
    return [1] if gpus == 2 else [1, 2]


def all_rows(gpus: int) -> list[Row]:
    return [*rows_of_all(gpus), *(row for part in parts_of(gpus) for row in rows_of_part(part))]


def base_flags(out: Path, tiny: bool) -> dict[str, object]:
    """Which model, and which adapter on it. Random weights come out of the seed of each tensor's name, so that every
    start has the same."""
    size = size_of(tiny)
    model = {"model.base": MINI} if tiny else {"model.base": out / "base", "model.random_init": True}
    dtype = "float32" if tiny else "bfloat16"
    return {**model, "model.dtype": dtype, "lora.rank": size.rank, "lora.alpha": size.rank}


def shards_of(out: Path, data: str) -> Path:
    return out / "data" / data / "shards"


def run_of(out: Path, row: Row) -> Path:
    """The folder of a row's run."""
    return out / "runs" / row.name


def arguments(row: Row, out: Path, tiny: bool) -> list[str]:
    """train.py's, for a row. A row that could not take the path it is named after fails and says so."""
    size = size_of(tiny)
    plain, planned = row.strategy == ZERO3, row.strategy == PRESET
    flags = base_flags(out, tiny) | {
        "model.kernels": "plain" if plain else "fused",
        "train.deepspeed": ROOT / "ds_configs" / ("zero3.json" if plain else "zero2.json"),
        "data.shards": shards_of(out, row.data),
        "data.caption_dropout": 0,  # every step has the same tokens
        "train.steps": row.steps,
        "train.warmup_steps": 2,
        "train.patience": 120 if tiny else 30,
        "save.output": run_of(out, row),
        "save.every": row.steps,
    }
    if not planned:
        flags["model.weights"] = row.weights
    if row.strategy == SHARDED:
        flags["model.shard"] = size.layers
    if row.data == MIXED:
        flags |= {"train.micro_batch_tokens": size.pack, "train.batch_packs": row.gpus}
    else:
        flags["train.batch_size"] = IMAGES * row.gpus
    return [*([str(CARD)] if planned else []), *words_of(flags)]


def words_of(flags: dict[str, object]) -> list[str]:
    """As a command line has them; what is True is a flag alone."""
    return [
        word
        for name, value in flags.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def arguments_of_part(doc: str | None) -> argparse.Namespace:
    """What hdl.fleet tells the parts that measure; doc: what they say of themselves."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--of", type=int, required=True, help="GPUs of the machine")
    parser.add_argument("--until", type=float, required=True, help="when to end: seconds since 1970")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()
