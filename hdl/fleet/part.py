"""A part of a measurement in processes of its own, which is ended with all that it started.

torchrun's workers, and what launch/node.sh starts, are in sessions of their own: no signal to a process group reaches
them all. But they inherit the environment, so each part's has a mark, and who has it belongs to the part.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "HDL_PART"
PAUSE = 0.02  # seconds
LONGEST = 10.0  # seconds for the kernel to clear up after a killed process


class Part:
    """Started at once. It sees its own parts as parts of it."""

    def __init__(
        self, name: str, command: Sequence[str | Path], cwd: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        """log: of its output and errors; environment: beside this process's."""
        self.name, self.log = name, log
        self.mark = f"{os.environ.get(MARK, os.getpid())}/{name}"
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd, env=os.environ | environment | {MARK: self.mark},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self, until: float, ready: Callable[[], bool] = lambda: False) -> bool:
        """Return when it is ready, or has ended; False where it is neither at `until`, in seconds since 1970."""
        while self.status is None and not ready():
            if time.time() > until:
                return False
            time.sleep(PAUSE)
        return True

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Kill what is left of it."""
        until = time.time() + LONGEST
        while (left := processes_of(self.mark)) and time.time() < until:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(PAUSE)
        self._process.wait()

    def said(self) -> str:
        """What went wrong, as its log has it: its last error, or else its last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["nothing was said"])[-1].removeprefix("error: ")


def processes_of(mark: str) -> list[int]:
    """All that are alive and belong to the part with this mark, or to parts of it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{variables(folder).get(MARK, '')}/".startswith(f"{mark}/"):
                found.append(int(folder.name))
    return sorted(found)


def rank_of(mark: str, rank: int) -> int | None:
    """The id of the part's Python process that torchrun started as this rank of the machine; None: it is not there."""
    for pid in processes_of(mark):
        with suppress(OSError):
            program = Path(os.readlink(f"/proc/{pid}/exe")).name
            if (
                program.startswith("python")
                and variables(Path(f"/proc/{pid}")).get("LOCAL_RANK") == f"{rank}"
            ):
                return pid
    return None


def variables(process: Path) -> dict[str, str]:
    """The environment that a process of /proc was started with; empty for one that has ended, OSError for others'."""
    pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
