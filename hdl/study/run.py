"""Studies: the same set learnt in several ways, each from several seeds, and what came of it as tables.

An arm is a run of the trainer itself with some options of its own. All arms of a study see the same pictures for the
same number of steps and are judged by the same prompts and noise; seeds differ in the adapter's start, the order of
the pictures, their noise and its levels. A study that was broken off goes on where it was: what an arm came to is kept
in its folder, and an arm that several studies have is run once, in the first one's.
"""

import gc
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.config import Run, load_run
from hdl.data.prepare import Options, prepare
from hdl.engine.loop import train
from hdl.engine.processes import Processes
from hdl.errors import HdlError
from hdl.mini.shapes import CANVAS
from hdl.mini.style import TRIGGER
from hdl.mini.taught import TAG
from hdl.sample.grid import picture_grid
from hdl.study.measures import BASE, Judge
from hdl.study.sets import BLEND, CONTENT, LOOK, TAG_WORDS, write_set

PICTURES = 191
CONTROL, DEFAULT = "control", "default"
NOTHING = ["--preserve.share", "0"]
NAMED = ["--data.phrases", json.dumps([TAG_WORDS])]
BY_HEART = [*NAMED, "--data.tags", json.dumps({TAG: 3}), "--preserve.weight", "4", "--train.steps", "800"]

# By study: its set, and arms in the order of the table, each with the options it has besides.
STUDIES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "look": (LOOK, {CONTROL: NOTHING, DEFAULT: []}),
    "content": (
        CONTENT,
        {
            CONTROL: NOTHING,
            DEFAULT: NAMED,
            "weight 4": [*NAMED, "--preserve.weight", "4"],
            "1200 steps": [*NAMED, "--train.steps", "1200"],
            "3x, weight 4, 800 steps": BY_HEART,
            "3x, weight 4, 800 steps, a tenth dropped": [*BY_HEART, "--data.caption_dropout", "0.1"],
            "phrase not named": [],
        },
    ),
    "blend": (BLEND, {CONTROL: NOTHING, DEFAULT: []}),
    "weight": (LOOK, {f"weight {w}": ["--preserve.weight", str(w)] for w in (1, 4, 16, 64)}),
    "share": (LOOK, {f"share {s}": ["--preserve.share", str(s)] for s in (0.1, 0.2, 0.4)}),
    "rank": (LOOK, {f"rank {r}": ["--lora.rank", str(r), "--lora.alpha", str(r)] for r in (4, 16, 64)}),
    "rate": (LOOK, {f"rate {lr}": ["--train.lr", lr] for lr in ("1e-3", "3e-3", "1e-2")}),
    "captions": (
        LOOK,
        {"none dropped": []} | {f"dropout {d}": ["--data.caption_dropout", str(d)] for d in (0.1, 0.3)},
    ),
    "flow": (
        LOOK,
        {
            "uniform": [],
            "logit-normal": ["--flow.sigma", "logit_normal"],
            "shift 3": ["--flow.shift", "3"],
            "velocity": ["--flow.weighting", "velocity"],
            "min-SNR": ["--flow.weighting", "min_snr"],
        },
    ),
    "average": (LOOK, {"last": [], "average": ["--train.ema", "0.98"]}),
    "weights": (
        LOOK,
        {
            "bf16": ["--model.dtype", "bfloat16"],
            "fp8": ["--model.weights", "fp8", "--model.dtype", "bfloat16"],
            "nf4": ["--model.weights", "nf4", "--model.dtype", "bfloat16"],
        },
    ),
    "cut": (
        LOOK,
        {
            "one pack": [],
            "accumulated": ["--train.micro_batch_size", "2"],
            "ZeRO-3": ["--train.deepspeed", "ds_configs/zero3.json"],
        },
    ),
}
NEEDS_A_GPU = ("nf4",)
KEPT = ".json"


@dataclass(frozen=True)
class Setting:
    """Of all arms: steps, images a step and prompts to judge by."""

    steps: int = 400
    batch_size: int = 8
    count: int = 48


class Study:
    """out: a folder for everything, new or of the same study."""

    def __init__(self, out: Path, name: str, setting: Setting, processes: Processes) -> None:
        self.out, self.name, self.setting, self.processes = out, name, setting, processes
        self.kind, self.arms = STUDIES[name]
        self.shards = prepared_set(out, name)

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.kind, self.setting.count, 1, self.processes)

    def run(self, seeds: Sequence[int]) -> str:
        """Every arm with every seed; the table, which is also written to table.md. Says what is left out."""
        arms = runs_of(self.name, self.processes.device.type == "cuda")
        for arm in arms:
            for seed in seeds:
                self.one(arm, seed)
        return write_table(self.out, self.name, arms, seeds)

    def one(self, arm: str, seed: int) -> dict[str, float]:
        """What the arm came to with this seed, by column."""
        kept = kept_in(self.out, self.name, arm, seed)
        if kept.exists():
            return json.loads(kept.read_text())  # type: ignore[no-any-return]
        folder, own = kept.with_name(kept.name.removesuffix(KEPT)), self.arms[arm]
        if train(described(own, self.setting, self.shards, folder, seed), self.processes):
            raise HdlError(f"{self.name}, {arm}, seed {seed} was stopped; start the study again to go on")
        outcome = self.judge.judge(folder / ("adapter_ema" if "--train.ema" in own else "adapter"))
        found = {
            "with": outcome.with_trigger, "without": outcome.without_trigger, "drift": outcome.distances.relative,
            "accuracy": outcome.accuracy, "drift itself": outcome.distances.drift, "seconds a step": step_time(folder),
        }  # fmt: skip
        rows = [list(row) for row in zip(*outcome.pictures.values())]
        picture_grid(rows, list(outcome.pictures), [str(i) for i in range(len(rows))]).save(f"{folder}.png")
        kept.write_text(json.dumps(found) + "\n")
        gc.collect()
        return found


def described(own: list[str], setting: Setting, shards: Path, output: Path, seed: int) -> Run:
    """The run of an arm with options of its own."""
    flags = {
        "model.base": BASE, "data.shards": shards, "data.trigger": TRIGGER, "save.output": output,
        "lora.rank": 16, "lora.alpha": 16, "train.steps": setting.steps, "train.batch_size": setting.batch_size,
        "train.lr": 3e-3, "train.schedule": "cosine", "train.warmup_steps": min(10, setting.steps - 1), "train.seed": seed,
        "train.grad_clip": 0.1, "save.every": setting.steps,
    }  # fmt: skip
    usual = [
        word for name, value in flags.items() if f"--{name}" not in own for word in (f"--{name}", str(value))
    ]
    return load_run([*usual, *own, "--resume", "auto"])


@cache
def first_with(name: str, arm: str) -> tuple[str, str]:
    """The first study, and its arm, that trains on the same set in the same way."""
    (kind, arms), nowhere = STUDIES[name], Path("nowhere")

    def run(own: list[str]) -> Run:
        return described(own, Setting(), nowhere, nowhere, 0)

    wanted = run(arms[arm])
    return next(
        (study, other)
        for study, (its_kind, its_arms) in STUDIES.items()
        for other, own in its_arms.items()
        if its_kind == kind and run(own) == wanted
    )


def prepared_set(out: Path, name: str) -> Path:
    """The shards of a study's set, which are made if they are not there."""
    kind, _ = STUDIES[name]
    shards = out / f"set-{kind}" / "shards"
    if not (shards / "index.json").exists():
        images = out / f"set-{kind}" / "images"
        if not images.exists():
            write_set(images, kind, PICTURES, seed=0)
        prepare(images, shards, BASE, options=Options(area=CANVAS))
    return shards


def runs_of(name: str, gpu: bool) -> list[str]:
    """The arms that can be run here; says what is left out."""
    arms = [arm for arm in STUDIES[name][1] if gpu or arm not in NEEDS_A_GPU]
    for arm in STUDIES[name][1]:
        if arm not in arms:
            print(f"{name}: {arm} needs a GPU, left out", flush=True)
    return arms


def kept_in(out: Path, name: str, arm: str, seed: int) -> Path:
    """The file of what an arm came to."""
    name, arm = first_with(name, arm)
    return out / name / f"{arm.replace(',', '').replace(' ', '-')}-{seed}{KEPT}"


def write_table(out: Path, name: str, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """The table of a study whose runs are all done, as it is written to table.md."""
    rows = {arm: [json.loads(kept_in(out, name, arm, seed).read_text()) for seed in seeds] for arm in arms}
    table = table_of(name, rows)
    (out / name).mkdir(exist_ok=True)  # all of its arms may be others'
    (out / name / "table.md").write_text(table)
    return table


def step_time(run: Path) -> float:
    """The median, in seconds, of a run's second half."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    seconds = [event.value for event in events.Scalars("speed/seconds_per_step")]
    return statistics.median(seconds[len(seconds) // 2 :])


def table_of(name: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: the mean over the seeds and, behind it, the least and the most."""
    columns = ["with", "without", "drift", "accuracy", "drift itself", "seconds a step"]
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm, seeds in rows.items():
        cells = []
        for column in columns:
            values = [found[column] for found in seeds]
            percent = column in ("with", "without", "drift", "accuracy")
            say = (lambda v: f"{v:.1%}") if percent else (lambda v: f"{v:.4f}")
            spread = f" ({say(min(values))} to {say(max(values))})" if len(values) > 1 else ""
            cells.append(say(statistics.mean(values)) + spread)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
