"""A run that is killed again and again ends as if it had not been.

Any process of the job, torchrun included, is killed at seeded random moments, a third of them while a checkpoint is
being written. After each, no checkpoint that was there may be lost, and `--resume auto` goes on. In the end, curves and
adapter are those of the undisturbed run, to the bit. 8 kills here; more by hand:

    HDL_KILLS=50 pytest -m job tests/engine/test_kills.py
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hdl.engine.checkpoints import checkpoints, step_of, verify
from tests.engine.forked import Job, Server, until
from tests.engine.test_faults import adapter, curves

pytestmark = pytest.mark.job

KILLS = int(os.environ.get("HDL_KILLS", "8"))
STEPS, EVERY = 8 * KILLS, 3  # so many that the run is still at work at the last kill

# A checkpoint of this small run is written in milliseconds, the real one takes seconds. And a step takes so short
# a time on a fast machine that the run would be over before the last kill.
SLOW_WORK = """
import os, time
import hdl.engine.checkpoints as checkpoints
from hdl.engine.step import TrainStep

def sha256(file, really=checkpoints.sha256):
    time.sleep(0.02)
    return really(file)

def forward_backward(self, *given, really=TrainStep.forward_backward):
    time.sleep(0.15)
    return really(self, *given)

checkpoints.sha256 = sha256
TrainStep.forward_backward = forward_backward
"""


def test_nothing_is_lost_however_often_a_run_is_killed(
    server: Server, described: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = {"train__steps": STEPS, "save__every": EVERY, "train__patience": 20}
    whole = server.start(described("undisturbed", **options))
    assert whole.wait(1200) == 0, whole.printed
    chance = random.Random(5)
    run, log = tmp_path / "run", []
    for kill in range(KILLS):
        job = server.start([*described("run", **options), "--resume", "auto"], first=SLOW_WORK)
        in_save = kill % 3 == 0
        wait_for_a_moment(job, run, in_save, chance)
        there = set(checkpoints(run / "checkpoints"))
        victim = chance.choice(["torchrun", "rank 0", "rank 1"])
        pid = job.agent if victim == "torchrun" else job.ranks()[int(victim[-1])]
        writing = list((run / "checkpoints").glob(".*.partial"))
        with suppress(ProcessLookupError):  # it may have ended just now
            os.kill(pid, signal.SIGKILL)
        job.wait(60)
        until(lambda job=job: not job.survivors(), 60, job.log)
        good = checkpoints(run / "checkpoints")
        for checkpoint in good:
            verify(checkpoint)
        assert there <= set(good), "a checkpoint is lost"
        log.append(f"{victim}{' in a save' if writing else ''} at {step_of(good[0]) if good else 0}")
    print("killed:", ", ".join(log))
    last = server.start([*described("run", **options), "--resume", "auto"])
    assert last.wait(600) == 0, last.printed
    assert adapter(run) == adapter(tmp_path / "undisturbed")
    assert curves(run) == curves(tmp_path / "undisturbed")
    assert set(curves(run)["loss"]) == set(range(1, STEPS + 1))
    assert sum("in a save" in line for line in log) >= KILLS // 4, log
    at_work = [line for line in log if not line.endswith(f" at {STEPS}")]
    assert len(at_work) > 0.9 * KILLS, log


def wait_for_a_moment(job: Job, run: Path, in_save: bool, chance: random.Random) -> None:
    """A random one from the start of the ranks on; or while a checkpoint is written."""
    until(lambda: len(job.ranks()) == 2 and all(job.ranks().values()), 120, job.log)
    if in_save:
        until(lambda: list(run.glob("checkpoints/.*.partial")) or not job.is_running(), 240, job.log)
        time.sleep(chance.uniform(0, 0.15))
    elif chance.random() < 0.25:
        time.sleep(chance.uniform(0, 3))  # most likely before the first step, and before the ranks have met
    else:
        newest = len(list(run.glob("checkpoints/step-*")))
        until(
            lambda: len(list(run.glob("checkpoints/step-*"))) > newest or not job.is_running(), 240, job.log
        )
        time.sleep(chance.uniform(0, 1))
