"""Decoding processes keep the order, and none outlives the run that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdl.data.workers import _answers, _bundles, in_order
from hdl.errors import HdlError

ROOT = Path(__file__).parents[2]
SCRIPT = """
import time
from hdl.data.workers import in_order
if __name__ == "__main__":
    for _ in in_order(time.sleep, iter([(i, 60) for i in range(3)]), 2):
        pass
"""


def test_answers_come_in_order() -> None:
    tasks = [(str(i), -i) for i in range(50)]
    for workers in (0, 2):
        assert list(in_order(abs, iter(tasks), workers)) == [(str(i), i) for i in range(50)]


def test_bundles_of_jobs_and_answers_too_large_for_one() -> None:
    """A bundle holds four jobs; answers of a worker are sent when they weigh 1, at the latest."""
    tasks = [(str(i), -i) for i in range(30)]
    found = list(in_order(abs, iter(tasks), 2, weight=lambda job: 0.25, answer_weight=heavy))
    assert found == [(str(i), i) for i in range(30)]
    bundles = list(_bundles(iter(tasks), lambda job: 0.25))
    assert [len(bundle) for bundle in bundles] == [4] * 7 + [2]
    assert [len(bundle) for bundle in _bundles(iter(tasks), lambda job: 7)] == [1] * 30
    assert _answers(abs, [-1, -2, -9, -9], heavy) == [1, 2]


def heavy(answer: int) -> float:
    return answer / 3


def test_killed_worker_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(HdlError, match=r"a worker process was killed.*smaller --workers"):
        list(in_order(os._exit, iter([(0, 3)]), 1))


def processes_of_group(group: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def test_workers_die_with_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 20
    while (
        len(processes_of_group(run.pid)) < 4 and time.monotonic() < deadline
    ):  # itself, tracker, two workers
        time.sleep(0.1)
    assert len(processes_of_group(run.pid)) >= 4
    time.sleep(1)  # for the workers to get to work
    run.send_signal(signal.SIGKILL)
    run.wait()
    while processes_of_group(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = processes_of_group(run.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
