"""What a run left in its folder (hdl/engine/run_folder.py), read back for its summary."""

import json
import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.errors import HdlError
from hdl.toml import read_toml

CONFIG, BEST = "config.toml", "best"
ADAPTERS = {"last": "adapter", "moving average": "adapter_ema", "best": BEST}  # what it is -> its folder

Curve = dict[int, float]  # step -> value, steps ascending


@dataclass(frozen=True)
class SkippedStep:
    step: int
    why: str
    samples: tuple[str, ...]  # in words


@dataclass(frozen=True)
class Record:
    """A run as far as its folder tells; what is not there is empty."""

    folder: Path  # absolute
    config: str  # the text
    trigger: str | None
    planned: int | None  # steps
    curves: dict[str, Curve]  # by tag
    first: datetime  # when the first and the last value of a curve were written, in UTC
    last: datetime
    skipped: list[SkippedStep]
    pictures: dict[int, Path]  # grids by step, ascending
    adapters: dict[str, Path]  # what it is -> the folder
    best: dict[str, object]  # what best/best.json says, by name

    @property
    def done(self) -> int:
        """Steps so far, skipped ones included."""
        steps = [max(curve) for curve in self.curves.values()] + [skip.step for skip in self.skipped]
        return max(steps, default=max(self.pictures, default=0))


def read_record(folder: Path) -> Record:
    """HdlError when the folder is no run's, or what is in it is not as a run writes it."""
    if not (folder / CONFIG).is_file():
        raise HdlError(f"{folder} holds no {CONFIG}: give the folder of a run, its save.output")
    try:
        config = read_toml(folder / CONFIG, "describes the run")
        trigger, planned = _field(config, "data", "trigger"), _field(config, "train", "steps")
        curves, times = _curves(folder / "tensorboard")
        times = times or [(folder / CONFIG).stat().st_mtime]
        record = Record(
            folder=folder.resolve(),
            config=(folder / CONFIG).read_text(encoding="utf-8"),
            trigger=trigger if isinstance(trigger, str) else None,
            planned=planned if isinstance(planned, int) else None,
            curves=curves,
            first=datetime.fromtimestamp(min(times), UTC),
            last=datetime.fromtimestamp(max(times), UTC),
            skipped=_skipped(folder / "skipped.jsonl"),
            pictures=_pictures(folder / "pictures"),
            adapters={
                what: folder.resolve() / name for what, name in ADAPTERS.items() if (folder / name).is_dir()
            },
            best=_best(folder / BEST / "best.json"),
        )
    except OSError as error:
        raise HdlError(
            f"{folder} cannot be read ({error}); make what it names readable, or remove it"
        ) from None
    if curves:  # a run that went back to an older checkpoint has yet to draw the later ones again
        for step in [step for step in record.pictures if step > record.done]:
            del record.pictures[step]
    return record


def _field(config: dict[str, Any], section: str, name: str) -> object:
    """Unchecked: the config may be of another version of hdl."""
    table = config.get(section)
    return table.get(name) if isinstance(table, dict) else None


def _curves(folder: Path) -> tuple[dict[str, Curve], list[float]]:
    """Every scalar by its tag, and when each curve began and ended (seconds since 1970). Steps that were taken again
    after a resume are there as they were taken last: the writer's purge_step tells."""
    if not folder.is_dir():
        return {}, []
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resume
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1}).Reload()
    curves, times = {}, []
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        curve = {scalar.step: scalar.value for scalar in scalars}
        if curve:  # a resume may have taken everything out
            curves[tag] = dict(sorted(curve.items()))
            times += [scalars[0].wall_time, scalars[-1].wall_time]
    return curves, times


def _skipped(file: Path) -> list[SkippedStep]:
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("}\n"):  # cut off when the run was killed
            continue
        try:
            said = json.loads(line)
            samples = tuple(f"{sample['key']} at sigma {sample['sigma']:.4f}" for sample in said["samples"])
            found.append(SkippedStep(int(said["step"]), str(said["why"]), samples))
        except (ValueError, KeyError, TypeError) as error:
            raise HdlError(
                f"{file}, line {number}: found {line.strip()[:80]!r} ({error!r}), expected step, why and samples as a "
                "run writes them; remove the line"
            ) from None
    return found


def _pictures(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def _best(file: Path) -> dict[str, object]:
    if not file.exists():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HdlError(
            f"{file} is not JSON ({error}); a run writes its step and scores there: remove it"
        ) from None
    if not isinstance(said, dict):
        raise HdlError(f"{file} holds {str(said)[:80]!r}, not an object with a step and scores; remove it")
    return said
