"""Whatever happens to a process of a job: the job ends soon and says why, or goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hdl.config import Train
from hdl.engine.processes import Processes
from hdl.engine.watch import PAUSE, Pace
from tests.engine.conftest import REPOSITORY, Finished
from tests.engine.forked import Job, Server, until

pytestmark = pytest.mark.job

Described = Callable[..., list[str]]
PATIENCE = 6.0  # seconds; of train.patience where something hangs


def curves(run: Path) -> dict[str, dict[int, float]]:
    finished = Finished(0, "", run)
    return {name: finished.curve(name) for name in ("loss", "grad_norm", "lr")}


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_saved(run: Path) -> list[int]:
    return sorted(int(p.name[-6:]) for p in (run / "checkpoints").glob("step-*"))


def come_to(run: Path, step: int, job: Job) -> None:
    """Return when a checkpoint of `step` steps is there."""
    until(lambda: step in steps_saved(run), 240, job.log)


@pytest.fixture(scope="module")
def memo() -> dict[str, Path]:
    return {}


@pytest.fixture
def undisturbed(server: Server, described: Described, tmp_path: Path, memo: dict[str, Path]) -> Path:
    """The run that the others are held to: 12 steps on two ranks."""
    if not memo:
        job = server.start(described("undisturbed"))
        assert job.wait() == 0, job.printed
        memo["run"] = tmp_path / "undisturbed"
    return memo["run"]


def assert_same(run: Path, other: Path) -> None:
    assert adapter(run) == adapter(other)
    assert curves(run) == curves(other) and set(curves(run)["loss"]) == set(range(1, 13))


@pytest.mark.parametrize("who", ["torchrun", "one rank"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    server: Server, described: Described, tmp_path: Path, undisturbed: Path, who: str
) -> None:
    """Asked of torchrun, which asks every rank, or of one rank alone: all stop after the same step."""
    run = tmp_path / "asked"
    job = server.start(described("asked", save__every=100), first=SLOWLY)
    until(lambda: "step/s" in job.printed and re.search(r" [3-9]/12 ", job.printed), 240, job.log)
    if who == "torchrun":
        os.kill(job.agent, signal.SIGTERM)
    else:
        os.kill(job.ranks()[1], signal.SIGUSR1)
    assert job.wait() == 1, job.printed
    asked = json.loads((run / "requeue").read_text())
    assert asked["signal"] == ("SIGTERM" if who == "torchrun" else "SIGUSR1")
    assert steps_saved(run) == [asked["step"]] and 3 <= asked["step"] < 12
    if who != "torchrun":
        assert "exitcode  : 85" in job.printed
    resumed = server.start([*described("asked", save__every=100), "--resume", "auto"])
    assert resumed.wait() == 0, resumed.printed
    assert not (run / "requeue").exists()
    assert_same(run, undisturbed)


# Every step takes at least so long, for something to happen in between.
SLOWLY = """
import time
from hdl.data.batches import Batches

def of_step(self, step, really=Batches.of_step):
    time.sleep(0.3)
    return really(self, step)

Batches.of_step = of_step
"""


def assert_ended(job: Job, since: float, within: float, message: str) -> None:
    """With one error, which names the rank; and nobody is left."""
    assert job.wait() != 0, job.printed
    assert time.monotonic() - since < within, job.printed
    until(lambda: not job.survivors(), within, job.log)
    found = [line for line in job.printed.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and re.search(message, found[0]), job.printed
    assert "Traceback" not in job.printed.split("torchrun:")[0].split("E1")[0], job.printed


def test_a_rank_that_is_killed_ends_the_job(server: Server, described: Described, tmp_path: Path) -> None:
    job = server.start(described("run"), first=SLOWLY)
    come_to(tmp_path / "run", 3, job)
    pid, since = job.ranks()[1], time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert_ended(job, since, 40, rf"rank 1 \(process {pid} on .*\) is dead; .*--resume auto")
    assert not (
        tmp_path / "run" / "requeue"
    ).exists()  # torchrun's SIGTERM to the survivor is not taken for a wish


def test_a_rank_that_is_stopped_ends_the_job(server: Server, described: Described, tmp_path: Path) -> None:
    job = server.start(described("run", train__patience=PATIENCE), first=SLOWLY)
    come_to(tmp_path / "run", 3, job)
    pid, since = job.ranks()[0], time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    message = rf"rank 0 \(process {pid} on .*\) has been silent for \d+ s: it is stopped"
    assert_ended(job, since, 40 + PATIENCE, message)


HANGING = """
import os, time
from hdl.data.batches import Batches

def of_step(self, step, really=Batches.of_step):
    if step == 5 and os.environ["RANK"] == "1":
        time.sleep(1000)
    return really(self, step)

Batches.of_step = of_step
"""


def test_a_rank_whose_work_hangs_ends_the_job(server: Server, described: Described, tmp_path: Path) -> None:
    job = server.start(described("run", train__patience=PATIENCE), first=HANGING)
    come_to(tmp_path / "run", 3, job)
    message = r"rank 1 \(process \d+ on .*\) has kept the others waiting at step 6 for \d+ s"
    assert_ended(job, time.monotonic(), 60 + PATIENCE, message)
    assert 'File "<string>", line 7 in of_step' in job.printed  # where it hangs


def test_torchrun_is_killed(server: Server, described: Described, tmp_path: Path) -> None:
    job = server.start(described("run"), first=SLOWLY)
    come_to(tmp_path / "run", 3, job)
    since = time.monotonic()
    os.kill(job.agent, signal.SIGKILL)
    assert_ended(job, since, 40, rf"torchrun \(process {job.agent} on .*\) is gone")


FAILING = """
import os
from hdl.data.batches import Batches

def of_step(self, step, really=Batches.of_step):
    if step == 5 and os.environ["RANK"] == "1":
        raise ZeroDivisionError("of rank 1 alone")
    return really(self, step)

Batches.of_step = of_step
"""


def test_an_error_of_one_rank_is_told_once(server: Server, described: Described) -> None:
    job = server.start(described("run"), first=FAILING)
    assert job.wait() != 0
    until(lambda: not job.survivors(), 40, job.log)
    assert job.printed.count("ZeroDivisionError: of rank 1 alone") >= 1
    assert "gloo" not in job.printed and "error: " not in job.printed, job.printed


DYING_ONCE = """
import os, signal, sys
from hdl.engine.processes import _use_deepspeed_on_cpu

_use_deepspeed_on_cpu()
import train
from hdl.data.batches import Batches
from hdl.errors import command_line

def of_step(self, step, really=Batches.of_step):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return really(self, step)

Batches.of_step = of_step
command_line(train.main)
"""


def test_torchrun_starts_a_job_again_by_itself(
    described: Described, tmp_path: Path, undisturbed: Path
) -> None:
    """torchrun itself, as its agent cannot fork a second time."""
    (tmp_path / "dying.py").write_text(DYING_ONCE)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "dying.py"), *described("run")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count("resuming after step 6") == 1
    assert re.search(r"error: rank 1 \(process \d+ on .*\) is dead", printed)
    assert_same(tmp_path / "run", undisturbed)


def test_a_folder_is_one_runs(server: Server, described: Described, tmp_path: Path) -> None:
    first = server.start(described("run", train__steps=40), first=SLOWLY)
    come_to(tmp_path / "run", 3, first)
    impatient = "import hdl.engine.run_folder as folder; folder.PATIENCE = 0.2"
    second = server.start([*described("run"), "--resume", "auto"], processes=1, first=impatient)
    assert second.wait() == 1
    assert f"is being written by process {first.ranks()[0]} on " in second.printed
    assert first.is_running() and steps_saved(tmp_path / "run")
    os.kill(first.agent, signal.SIGKILL)
    until(lambda: not first.survivors(), 40, first.log)


# From the second checkpoint on, files may have 40 kB: the kernel refuses to write more.
FULL = """
import resource
import hdl.engine.saving as saving

def write(folder, step, really=saving.write_checkpoint, **contents):
    if step > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    try:
        return really(folder, step, **contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

saving.write_checkpoint = write
"""


def test_a_disk_that_takes_no_more_ends_the_run(
    server: Server, described: Described, tmp_path: Path, undisturbed: Path
) -> None:
    job = server.start(described("run"), first=FULL)
    assert job.wait() == 1
    told = [line for line in job.printed.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "a checkpoint could not be written to" in told[0], job.printed
    assert "File too large" in told[0] and "earlier ones are intact" in told[0]
    assert steps_saved(tmp_path / "run") == [3]
    resumed = server.start([*described("run"), "--resume"])
    assert resumed.wait() == 0, resumed.printed
    assert_same(tmp_path / "run", undisturbed)


SLOW_DISK = """
import time
import hdl.engine.saving as saving

def write(folder, step, really=saving.write_checkpoint, **contents):
    time.sleep(3)
    return really(folder, step, **contents)

saving.write_checkpoint = write
"""


def test_writing_keeps_nobody_waiting_but_the_next_save(
    server: Server, described: Described, tmp_path: Path, undisturbed: Path
) -> None:
    job = server.start(described("run", save__every=4), first=SLOW_DISK + SLOWLY)
    assert job.wait() == 0, job.printed
    stalls = Finished(0, "", tmp_path / "run").curve("save/stall_seconds")
    assert stalls.keys() == {4, 8, 12}
    assert stalls[4] < 0.75 < stalls[8]  # 3 s, less the four steps in between
    assert_same(tmp_path / "run", undisturbed)


DIFFERING = """
import os, sys
if os.environ["RANK"] == "1":
    sys.argv += ["--train.lr", "0.5"]
"""


def test_ranks_with_different_configs(server: Server, described: Described, tmp_path: Path) -> None:
    job = server.start(described("run"), first=DIFFERING)
    assert job.wait() == 1
    told = [line for line in job.printed.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and re.search(r"rank 1 \(.*\) has train.lr 0.5, rank 0 \(.*\) has 0.01;", told[0])
    assert not (tmp_path / "run").exists()


# What happens to step 6 (number 5): its loss is reported as something else, its gradient spoiled, or it is not taken.
AT_STEP_6 = """
import os
import hdl.engine.loop as loop
from hdl.engine.step import TrainStep

def forward_backward(self, step, batches, sigmas, really=TrainStep.forward_backward):
    if step != 5:
        return really(self, step, batches, sigmas)
    {what}

TrainStep.forward_backward = forward_backward
"""
SPOILED = {
    "loss": """
    reading = really(self, step, batches, sigmas)
    reading.wait()[0] = {value}
    return reading
""",
    "gradient": """
    parameter = [p for p in self.engine.module.parameters() if p.requires_grad][-1]
    hook = parameter.register_hook(lambda gradient: gradient * float("{value}"))
    reading = really(self, step, batches, sigmas)
    hook.remove()
    return reading
""",
}
NEVER_TAKEN = """
import hdl.engine.loop as loop

def _step(self, really=loop.Loop._step):
    if self.done != 5:
        return really(self)
    self._settle()
    self.batches.of_step(5)
    self.engine.lr_scheduler.step()
    self.done += 1
    self.skipping.count += 1
    return False

loop.Loop._step = _step
"""


@pytest.mark.parametrize(
    ("what", "value", "options"),
    [
        ("loss", "float('nan')", {}),
        ("loss", "50.0", {"train__spike": 3.0}),
        ("gradient", "inf", {}),
        ("gradient", "nan", {"model__dtype": "bfloat16"}),
        ("gradient", "nan", {"train__deepspeed": "ds_configs/zero3.json"}),
    ],
)
def test_a_step_that_is_skipped_was_never_taken(
    server: Server, described: Described, tmp_path: Path, memo: dict[str, Path], what: str, value: str, options: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The schedule, the data and the noise go on. Saved after it and resumed, too."""
    options = {"train__steps": 9, "save__every": 7} | options
    few = "import hdl.engine.skipping as skipping; skipping.FEWEST = 3\n"
    hooked = few + AT_STEP_6.format(what=SPOILED[what].format(value=value).strip())
    job = server.start(described("skipping", **options), first=hooked)
    assert job.wait() == 0, job.printed
    reference = server.start(described("never", **options), first=few + NEVER_TAKEN)
    assert reference.wait() == 0, reference.printed
    skipping, never = tmp_path / "skipping", tmp_path / "never"
    assert adapter(skipping) == adapter(never)
    assert curves(skipping)["loss"] == curves(never)["loss"] and 6 not in curves(skipping)["loss"]
    assert Finished(0, "", skipping).curve("skipped_steps") == {6: 1}
    [line] = [json.loads(line) for line in (skipping / "skipped.jsonl").read_text().splitlines()]
    assert line["step"] == 6 and len(line["samples"]) == 4
    assert all(0 < sample["sigma"] < 1 and sample["key"] for sample in line["samples"])
    assert f"skipped a step: the {what} of step 6 is" in job.printed
    for folder in ("checkpoints/step-000009", "adapter"):
        for file in (skipping / folder).iterdir():
            file.unlink()
        (skipping / folder).rmdir()
    resumed = server.start([*described("skipping", **options), "--resume"], first=few)
    assert resumed.wait() == 0, resumed.printed
    assert "resuming after step 7" in resumed.printed and adapter(skipping) == adapter(never)


def test_a_rank_is_held_up_while_its_step_stays_the_same() -> None:
    """Not while its step is only known late, and it seems to be one behind all the time."""
    pace = Pace()
    assert [pace.held_up(step, step + 1, False, float(step)) for step in range(100)] == [0.0] * 100
    assert [pace.held_up(99, 100, False, t) for t in (100.0, 101.0, 107.0)] == [0.0, 1.0, 7.0]
    assert pace.held_up(99, 100, True, 108.0) == 0.0  # waits for its disk, and says so
    assert [pace.held_up(99, 100, False, t) for t in (109.0, 111.0)] == [0.0, 2.0]
    assert pace.held_up(99, 99, False, 112.0) == pace.held_up(-1, 99, False, 113.0) == 0.0


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 33))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_dropped_gradient_leaves_nothing_behind(
    group: Processes, tmp_path: Path, stage: int, dtype: torch.dtype
) -> None:
    """With two micro-batches a step: not in the weights, the moments, the count of steps or the next gradient."""
    from hdl.engine.full_state import KINDS, FullState
    from hdl.engine.partitions import states
    from hdl.engine.sharding import shard
    from hdl.engine.skipping import drop_gradient

    strategy = tmp_path / "zero.json"
    strategy.write_text(json.dumps({"zero_optimization": {"stage": stage}}))

    def trained(drops: bool) -> tuple[list[Tensor], list[float], list[float]]:
        train = Train(
            batch_size=2,
            micro_batch_size=1,
            steps=9,
            warmup_steps=3,
            lr=0.1,
            schedule="cosine",
            deepspeed=strategy,
        )
        engine = shard(Gain().to(dtype), train, dtype, group)
        rates = []
        for step in range(6):
            rates.append(engine.get_lr()[0])
            dropped = step in (0, 3)  # the first, before which there are no moments, and one later
            if dropped and not drops:
                engine.lr_scheduler.step()
                continue
            for part in range(2):
                x = torch.randn(33, generator=torch.Generator().manual_seed(2 * step + part)).to(dtype)
                loss = engine(x).float().square().sum()
                engine.backward(loss * (float("nan") if dropped and part else 1))
                if part == 0:
                    engine.step()
            if dropped:
                drop_gradient(engine)
            else:
                engine.step()
        state = FullState(engine, holds=True)
        state.refill().wait()
        counts = [float(s["step"]) for s in states(engine)]
        return [t for kind in KINDS for t in state.named(kind).values()], rates, counts

    (tensors, rates, counts), (others, others_rates, others_counts) = trained(True), trained(False)
    assert rates == others_rates and len(set(rates)) == 6
    assert counts == others_counts == [4.0]
    assert all(torch.equal(t, o) and t.isfinite().all() for t, o in zip(tensors, others))


def test_the_judge_does_not_blame_others_for_its_own_sleep(
    server: Server, described: Described, tmp_path: Path
) -> None:
    """A job whose processes were all stopped for a while, as by a debugger or a suspended machine, goes on."""
    job = server.start(described("run", train__patience=3, train__steps=6), first=SLOWLY)
    come_to(tmp_path / "run", 3, job)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in job.ranks().values():
            os.kill(pid, number)
        time.sleep(4 + 5 * PAUSE if number == signal.SIGSTOP else 0)
    assert job.wait() == 0, job.printed
