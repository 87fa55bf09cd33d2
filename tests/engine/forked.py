"""Runs of train.py, alone or under torchrun's own agent, started in a second: forked from a process that has imported
all.

Importing torch, DeepSpeed and PEFT takes a process fifteen seconds, which tests that start dozens cannot spend. A server
imports them once and forks, for each job, a supervisor (which writes down how the job ended), the agent and from
that the ranks. They are what `torchrun train.py` would have, but for their command lines.

    python -m tests.engine.forked    reads a job in JSON from each line of its input
"""

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A job that has been started. log: what its processes print."""

    log: Path

    @property
    def printed(self) -> str:
        return self.log.read_text()

    @property
    def agent(self) -> int:
        """The process id of torchrun, or of a run without it."""
        return int(until(lambda: _read(self.log.with_suffix(".agent")), 60, self.log))

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of those that have joined the job so far."""
        return {
            int(p.suffix[1:]): int(p.read_text() or 0)
            for p in self.log.parent.glob(f"{self.log.stem}.rank.*")
        }

    def wait(self, seconds: float = 240) -> int:
        """torchrun's exit status, or that of a run without it: negative for a signal."""
        return int(until(lambda: _read(self.log.with_suffix(".status")), seconds, self.log))

    def is_running(self) -> bool:
        return not _read(self.log.with_suffix(".status"))

    def survivors(self) -> list[int]:
        return [pid for pid in self.ranks().values() if _is_alive(pid)]


class Server:
    """Starts jobs, while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __enter__(self) -> "Server":
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
            "CUDA_VISIBLE_DEVICES": "",  # no forked process can use a GPU
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.forked"],
            cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for log in self.folder.glob("job-*.log"):  # whatever a test that failed has left
            job = Job(log)
            for pid in [int(_read(log.with_suffix(".agent")) or 0), *job.ranks().values()]:
                if job.is_running() and pid and b"tests.engine.forked" in _command(pid):
                    os.kill(pid, signal.SIGKILL)

    def start(
        self,
        arguments: list[str],
        processes: int = 2,
        restarts: int = 0,
        first: str = "",
        script: str | Path = "train.py",
        **environment: str,
    ) -> Job:
        """arguments: the script's; processes: torchrun's --nproc_per_node, 0 for a run without torchrun; restarts: its
        --max-restarts; first: Python that every rank runs before the script; environment: more of it, for every
        process of the job."""
        self.count += 1
        log = self.folder / f"job-{self.count}.log"
        log.touch()
        job = {"arguments": arguments, "processes": processes, "restarts": restarts, "first": first}
        job["script"] = str(script)
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job | {"log": str(log), "environment": environment}) + "\n")
        self.process.stdin.flush()
        return Job(log)


def until(ready: Callable[[], Any], seconds: float, log: Path | None = None) -> Any:
    """What `ready` returns once that is something; AssertionError when it takes too long."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited {seconds} s: {log.read_text() if log else ready}"
        time.sleep(0.002)
    return found


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def serve() -> None:
    from hdl.engine import processes

    processes._use_deepspeed_on_cpu()

    import hdl.engine.loop  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are nobody's concern
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _supervise(job)
            os._exit(0)


def _supervise(job: dict[str, Any]) -> None:
    log = Path(job["log"])
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["environment"])
    agent = os.fork()
    if agent == 0:
        status = 1
        try:
            status = _launch(job, log) if job["processes"] else _alone(job, log)
        finally:
            sys.stdout.flush()
            os._exit(status)
    log.with_suffix(".agent").write_text(str(agent))
    _, status = os.waitpid(agent, 0)
    log.with_suffix(".status").write_text(str(os.waitstatus_to_exitcode(status)))


def _alone(job: dict[str, Any], log: Path) -> int:
    try:
        _rank(job["script"], job["arguments"], job["first"], str(log))
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _launch(job: dict[str, Any], log: Path) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=job["processes"], run_id=log.stem, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=job["restarts"], start_method="fork",
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", monitor_interval=0.1, shutdown_timeout=60,
    )  # fmt: skip
    try:
        elastic_launch(config, _rank)(job["script"], job["arguments"], job["first"], str(log))
        return 0
    except (ChildFailedError, SignalException) as error:
        print(f"torchrun: {error}", file=sys.stderr, flush=True)
        return 1


def _rank(script: str, arguments: list[str], first: str, log: str) -> None:
    from tqdm import tqdm

    ctypes.CDLL(None).prctl(
        1, 0
    )  # PR_SET_PDEATHSIG: torchrun's workers outlive it, unless they look after that
    for entry in os.listdir("/proc/self/fd"):  # nor do its workers have its sockets
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                os.close(int(entry))
    mark = Path(log).with_suffix(f".rank.{os.environ.get('RANK', 0)}")
    mark.write_text(str(os.getpid()))
    tqdm.set_lock(
        threading.RLock()
    )  # its own is one for all forks, and stays taken when one is killed with it
    sys.argv = [script, *arguments]
    exec(first, {"__name__": "first"})
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve()
