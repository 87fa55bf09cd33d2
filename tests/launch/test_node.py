"""launch/node.sh: what it refuses, how it stops, how it starts again, and its cache of shards."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import REPOSITORY
from tests.launch.conftest import ENVIRONMENT, STEPS, Describe, Described, clean, node

pytestmark = pytest.mark.job


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PROCESSES": "two"}, "PROCESSES is 'two', expected a whole number"),
        ({"PROCESSES": "0"}, "PROCESSES is 0, expected at least 1"),
        ({"NODES": "2"}, "RENDEZVOUS is '' with NODES=2, expected HOST:PORT"),
        ({"NODES": "2", "RENDEZVOUS": "here"}, "RENDEZVOUS is 'here' with NODES=2"),
        ({"NODES": "2", "RENDEZVOUS": "no.such.invalid:1"}, "'no.such.invalid' is not reached from"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK is 2 of NODES=2, expected 0 to 1"),
    ],
)
def test_what_it_refuses(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    done = node(Described(tmp_path / "run.toml", tmp_path), **environment)
    assert done.returncode == 2 and said in done.stderr


def shm() -> set[Path]:
    return set(Path("/dev/shm").glob(f"hdl-{os.getuid()}-*"))


def test_stopped_then_continued_by_way_of_shared_memory(describe: Describe, alone: Described) -> None:
    """SIGTERM in mid-run: 85, and continued it ends as the run that nothing came between."""
    run, before = describe("stopped"), shm()
    environment = clean(os.environ) | ENVIRONMENT | {"SHM_CACHE_GIB": "0.5"}
    command = [REPOSITORY / "launch" / "node.sh", run.config, "--resume", "auto"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as script:
        until = time.monotonic() + 300
        while not run.saved() and script.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        (cache,) = shm() - before
        shards = list((cache / "shards").glob("*.tar"))
        script.send_signal(signal.SIGTERM)
        printed, _ = script.communicate(timeout=120)
    assert script.returncode == 85, printed
    assert "asked to stop" in printed and "Traceback" not in printed
    assert shards and not cache.exists()
    stopped = int(run.saved()[-1].removeprefix("step-"))
    assert 0 < stopped < STEPS

    done = node(run, "--resume", "auto")
    assert done.returncode == 0 and f"step {stopped}" in done.stdout, done.stdout + done.stderr
    expected = alone.adapter
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.adapter.items())


def test_a_cache_that_is_no_size(describe: Describe) -> None:
    done = node(describe("no_size"), SHM_CACHE_GIB="much")
    assert done.returncode == 1 and "SHM_CACHE_GIB is 'much', expected GiB above 0" in done.stderr
