"""A run that is killed and goes on by itself, and then on half of the GPUs: started as a user would, by launch/node.sh.

    python -m hdl.fleet.faults OUT --of GPUS --until SECONDS [--tiny]

e4m3 weights and one image a GPU. As soon as the first checkpoint is whole, the last rank's process gets SIGKILL; torchrun
starts all of them again, which go on from there to the end. The same run is then continued on half of the GPUs for a
few steps more. What came of it is in OUT/faults.json, one entry a fault, written as soon as it is known.
"""

import json
import math
import os
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.errors import command_line
from hdl.fleet.part import Part, rank_of
from hdl.fleet.rows import EQUAL, ROOT, arguments_of_part, base_flags, shards_of

# A save waits for the one before: the first checkpoint is whole before step 2 * EVERY is over, and steps are left to be
# killed in.
STEPS, EVERY, MORE = 60, 20, 6


@dataclass(frozen=True)
class Outcome:
    """what: was done. why: it did not go as it should; None where it did. seconds: from that until the first step was
    reported that was taken after it. resumed: after which step it went on. stalls: seconds that each save kept training
    waiting."""

    what: str
    why: str | None = None
    seconds: float | None = None
    resumed: int | None = None
    stalls: tuple[float, ...] = ()


def main() -> None:
    args = arguments_of_part(__doc__)
    faults = Faults(args.out, args.of, args.until, args.tiny)
    told: list[Outcome] = []
    for fault in (faults.killed, faults.halved):
        told.append(fault())
        text = json.dumps([asdict(one) for one in told], indent=1)
        (args.out / "faults.json").write_text(text + "\n", encoding="utf-8")
        print(f"{told[-1].what}: {told[-1].why or 'ok'}", flush=True)
        if told[-1].why:
            break


class Faults:
    """Of one run, which OUT/faults holds."""

    def __init__(self, out: Path, gpus: int, until: float, tiny: bool) -> None:
        self.gpus, self.until, self.tiny = gpus, until, tiny
        self.folder = out / "faults"
        self.run, self.config = self.folder / "run", self.folder / "run.toml"
        self.folder.mkdir(parents=True, exist_ok=True)
        flags: dict[str, object] = base_flags(out, tiny) | {
            "model.weights": "fp8",
            "model.kernels": "fused",
            "data.shards": shards_of(out, EQUAL),
            "train.steps": STEPS,
            "train.batch_size": gpus,
            "train.warmup_steps": 2,
            "train.patience": 120.0 if tiny else 30.0,
            "train.deepspeed": ROOT / "ds_configs" / "zero2.json",
            "save.output": self.run,
            "save.every": EVERY,
        }
        described: dict[str, dict[str, object]] = {}
        for name, value in flags.items():
            section, field = name.split(".")
            described.setdefault(section, {})[field] = str(value) if isinstance(value, Path) else value
        self.config.write_text(tomli_w.dumps(described), encoding="utf-8")

    def killed(self) -> Outcome:
        """One rank, after the first save."""
        victim = self.gpus - 1
        what = f"rank {victim} of {self.gpus} killed with SIGKILL after the save of step {EVERY}"
        part = self.node("killed", self.gpus)
        try:
            saved = self.run / "checkpoints" / f"step-{EVERY:06d}"
            if not part.wait(self.until, saved.exists):
                return Outcome(what, f"no checkpoint after step {EVERY} when the time was over")
            process = rank_of(part.mark, victim)
            if process is None or part.status is not None:
                return Outcome(what, f"the run ended before it could be killed: {part.said()}")
            os.kill(process, signal.SIGKILL)
            return self.outcome(what, part, time.time(), EVERY, STEPS)
        finally:
            part.end()

    def halved(self) -> Outcome:
        """The GPUs of the run, which has ended."""
        half, last = self.gpus // 2, STEPS + MORE
        what = f"resumed on {half} of {self.gpus} GPUs, for {MORE} steps more"
        began = time.time()
        part = self.node("halved", half, "--resume", "--train.steps", str(last))
        try:
            return self.outcome(what, part, began, STEPS, last)
        finally:
            part.end()

    def node(self, name: str, gpus: int, *flags: str) -> Part:
        """launch/node.sh with the run, on so many GPUs."""
        count = {"GPUS": "0", "PROCESSES": str(gpus)} if self.tiny else {"GPUS": str(gpus)}
        command: list[str | Path] = [ROOT / "launch" / "node.sh", self.config, *flags]
        return Part(name, command, ROOT, self.folder / f"{name}.log", count | {"RESTARTS": "1"})

    def outcome(self, what: str, part: Part, since: float, saved: int, last: int) -> Outcome:
        """Of a run that went on, or is to, from the checkpoint after step `saved` until step `last`."""
        if not part.wait(self.until):
            return Outcome(what, "had not ended when the time was over")
        if part.status:
            return Outcome(what, f"launch/node.sh ended with {part.status}: {part.said()}")
        resumed = [int(step) for step in re.findall(r"resuming after step (\d+)", part.log.read_text())]
        if not resumed:
            return Outcome(what, "no process went on from a checkpoint")
        # One file of curves for each start; names begin with the second that it was made in.
        *_, newest = sorted((self.run / "tensorboard").glob("events.*"), key=lambda path: path.name)
        stalls = tuple(
            event.value
            for file in (self.run / "tensorboard").glob("events.*")
            for event in scalars(file, "save/stall_seconds")
        )
        losses = scalars(newest, "loss")
        why = None
        if resumed[-1] < saved:
            why = f"went on after step {resumed[-1]}, expected {saved} or later"
        elif [loss.step for loss in losses] != list(range(resumed[-1] + 1, last + 1)):
            why = f"took the steps {[loss.step for loss in losses]}, expected {resumed[-1] + 1} to {last}"
        elif not all(math.isfinite(loss.value) for loss in losses):
            why = "some losses are not finite"
        elif not (self.run / "checkpoints" / f"step-{last:06d}").exists():
            why = f"no checkpoint after step {last}"
        return Outcome(what, why, losses[0].wall_time - since if losses else None, resumed[-1], stalls)


def scalars(file: Path, name: str) -> list:  # type: ignore[type-arg]  # of tensorboard's ScalarEvent
    events = EventAccumulator(str(file), {"scalars": 0}).Reload()
    return events.Scalars(name) if name in events.Tags()["scalars"] else []


if __name__ == "__main__":
    command_line(main)
