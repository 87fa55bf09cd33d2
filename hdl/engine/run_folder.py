"""The folder of a run, and the promise that nothing in it is ever overwritten by another run.

config.toml          the resolved config; `train.py config.toml` runs the same again
adapter/             the PEFT adapter after the last step
adapter_ema/         with train.ema: its average over the steps, a PEFT adapter too
best/                with validation.style: the adapter that scored best, and its scores in best.json
checkpoints/         step-NNNNNN: what --resume continues from
pictures/            step-NNNNNN.png: validation prompts without and with the adapter, and with its average
tensorboard/         curves and the same pictures
validated            how many steps had been taken at the last validation that came to its end
skipped.jsonl        steps that were not taken, and their samples
summary.html         the page that shows all this, written when the run has ended (tools/summary.py: at any time)
requeue              there while the run has stopped because it was asked to: start it again with --resume auto
.lock                held by rank 0 for as long as it runs

The lock is the kernel's (flock): it goes with the process, however that ends. On NFS it holds between machines
where the mount supports locks, as version 4 does.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hdl.config import Run, save_run
from hdl.engine.checkpoints import checkpoints, newest_good, read_state, sweep
from hdl.errors import HdlError

PATIENCE = 10.0  # seconds for a run that has just been killed to let go of the folder
LOCK_FILE = ".lock"
OF_A_START = {LOCK_FILE, ".config.toml.partial", "config.toml"}  # which ended before anything was made


@dataclass(frozen=True)
class Found:
    """What there is to continue."""

    newest: Path | None = None  # the newest checkpoint that is whole
    passed_over: tuple[str, ...] = ()  # why newer ones are not
    damaged: tuple[Path, ...] = ()  # those


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.adapter = path / "adapter"
        self.average = path / "adapter_ema"
        self.best = path / "best"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.tensorboard = path / "tensorboard"
        self.skipped = path / "skipped.jsonl"
        self.requeue = path / "requeue"
        self.validated = path / "validated"
        self._lock: IO[str] | None = None

    def check(self, run: Run) -> None:
        """HdlError unless the folder is new, empty, or that of the run to resume."""
        used = self.path.exists() and (
            not self.path.is_dir() or any(map(_is_worth_keeping, self.path.iterdir()))
        )
        if used and (run.resume == "no" or (run.resume == "auto" and not self.config.is_file())):
            what = "the output of another run" if self.config.exists() else "not an empty folder"
            raise HdlError(
                f"save.output {self.path} is {what}; nothing was changed there. Give another folder, or --resume to "
                "continue that run"
            )
        if run.resume == "must" and not self.config.is_file():
            raise HdlError(f"save.output {self.path} holds no run to resume; start it without --resume")

    def hold(self) -> None:
        """Make the folder and keep other runs out of it until `release`, or until this process ends.

        HdlError when another run has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK_FILE, "a+")  # noqa: SIM115  # for as long as the run lasts
        except OSError as error:
            raise HdlError(f"save.output {self.path} cannot be written to ({error})") from None
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    holder = lock.read().strip() or "another process"
                    lock.close()
                    raise HdlError(
                        f"save.output {self.path} is being written by {holder} ({error.strerror}); give another folder, or "
                        "end that run first"
                    ) from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def find(self, run: Run, trained_on: dict[str, str]) -> Found:
        """What to continue. HdlError when that is another run's, when nothing is whole, or there must be something
        and is not."""
        passed_over: list[str] = []
        newest = newest_good(self.checkpoints, passed_over.append)
        if newest is None:
            if run.resume == "must":
                raise HdlError(
                    f"{self.checkpoints} holds no checkpoint to resume from; remove {self.path} and start again without "
                    "--resume"
                )
            return Found()
        state = read_state(newest)
        for what, now in trained_on.items():
            if state.get(what, now) != now:  # earlier versions of hdl have not written all of it
                raise HdlError(
                    f"{newest} is of another {what} ({state.get(what)}) than this config's ({now}); resume it with its "
                    "own config.toml, or start in another folder"
                )
        order = checkpoints(self.checkpoints)
        return Found(newest, tuple(passed_over), tuple(order[: order.index(newest)]))

    def claim(self, run: Run) -> None:
        """Make what is in the folder, write the config into it, and sweep up after a run that was killed."""
        try:
            partial = self.path / ".config.toml.partial"
            save_run(run, partial)
            partial.rename(self.config)  # first: from now on, it is this run's folder
            for folder in (self.checkpoints, self.pictures, self.tensorboard):
                folder.mkdir(parents=True, exist_ok=True)
            sweep(self.checkpoints)
            self.requeue.unlink(missing_ok=True)
        except OSError as error:
            raise HdlError(f"save.output {self.path} cannot be written to ({error})") from None

    def remember_validation(self, step: int) -> None:
        with suppress(OSError):  # on a full disk it will be made again
            self.validated.write_text(f"{step}\n")

    def last_validation(self) -> int:
        """The step of the last validation; -1 when there is none, or it cannot be told."""
        try:
            return int(self.validated.read_text())
        except (OSError, ValueError):
            return -1

    def ask_for_requeue(self, signal: str, step: int) -> None:
        self.requeue.write_text(json.dumps({"signal": signal, "step": step}) + "\n")


def _is_worth_keeping(found: Path) -> bool:
    """Whether something in a run's folder is more than a start leaves that ended before its first step."""
    return any(found.iterdir()) if found.is_dir() else found.name not in OF_A_START
