"""launch/slurm against a real Slurm of two nodes: preempted, requeued, resumed and finished; an array of tasks."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import REPOSITORY
from tests.launch.conftest import ENVIRONMENT, STEPS, Describe, Described
from tests.launch.slurm_cluster import Cluster, cluster, lacking

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(lacking() is not None, reason=f"no Slurm here: {lacking()}"),
]
OVERRIDES = ["--cpus-per-task=1", "--time=30"]  # the files' own are for nodes with eight GPUs
NO_GPUS = {"train.sbatch": "--gpus-per-node=0", "array.sbatch": "--gpus=0"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


def submit(slurm: Cluster, script: str, *arguments: str, log: Path, options: tuple[str, ...] = ()) -> str:
    """The number of a job that runs, or will."""
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in ENVIRONMENT.items())])
    return slurm.tell(
        "sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--export={exported}", f"--output={log}", *OVERRIDES,
        NO_GPUS[script], *options, str(REPOSITORY / "launch" / "slurm" / script), *arguments,
    )  # fmt: skip


def until_saved(run: Described, slurm: Cluster, job: str, log: Path) -> None:
    until = time.monotonic() + 400
    while not run.saved():
        told = log.read_text(errors="replace") if log.exists() else slurm.told()
        assert time.monotonic() < until and slurm.state(job) in ("PENDING", "RUNNING"), told
        time.sleep(0.1)


def test_preempted_requeued_and_finished(
    slurm: Cluster, describe: Describe, undisturbed: Described, tmp_path: Path
) -> None:
    run, log = describe("preempted"), tmp_path / "job.log"
    job = submit(slurm, "train.sbatch", str(run.config), log=log, options=("--nodes=2",))
    until_saved(run, slurm, job, log)
    slurm.tell("scontrol", "requeue", job)
    state = slurm.wait(job, seconds=500)
    told = log.read_text(errors="replace")
    assert state == "COMPLETED", told
    assert "start 1: node[1-2], rendezvous at 127.0.0.1:" in told and "start 2: node[1-2]" in told
    assert "asked to stop: node 0" in told and "asked to stop: node 1" in told
    assert "so it is not requeued from here" in told  # Slurm was doing that already
    stopped = [
        int(line.split("step ")[1].split(":")[0]) for line in told.splitlines() if "resuming after" in line
    ]
    assert len(stopped) == 1 and 0 < stopped[0] < STEPS, told
    expected, found = undisturbed.adapter, run.adapter
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert run.losses() == undisturbed.losses()


def test_an_array_in_which_one_task_is_told_of_its_time_limit_and_another_fails(
    slurm: Cluster, describe: Describe, tmp_path: Path
) -> None:
    """The notice before the time limit, as Slurm gives it with --signal: the script has the task requeued itself."""
    run, listed = describe("listed"), tmp_path / "loras.txt"
    broken = tmp_path / "no such.toml"
    listed.write_text(f"# two of them\n\n{run.config} --train.batch_size 2\n'{broken}' --lora.rank 8\n")
    job = submit(slurm, "array.sbatch", str(listed), log=tmp_path / "%a.log", options=("--array=1-2",))
    until_saved(run, slurm, f"{job}_1", tmp_path / "1.log")
    slurm.tell("scancel", "--batch", "--signal=USR1", f"{job}_1")
    states = slurm.wait(f"{job}_1", seconds=500), slurm.wait(f"{job}_2")
    one, two = ((tmp_path / f"{task}.log").read_text(errors="replace") for task in (1, 2))
    assert states == ("COMPLETED", "FAILED"), one + two
    assert f"job {job}_1: stopped when asked to and saved; back into the queue" in one
    assert "resuming after" in one and run.saved()[-1] == f"step-{STEPS:06d}" and run.adapter
    assert f"error: {broken}: no such config" in two
    assert f"error: task {job}_2, line 4 of {listed} ('{broken}' --lora.rank 8) ended with status 1" in two


def test_what_a_list_lacks(slurm: Cluster, tmp_path: Path) -> None:
    listed, log = tmp_path / "loras.txt", tmp_path / "log"
    listed.write_text("run.toml --save.output 'one\n")
    jobs = [
        submit(slurm, "array.sbatch", str(listed), log=log, options=("--array=1",)),
        submit(slurm, "array.sbatch", str(listed), log=log, options=("--array=7",)),
        submit(slurm, "array.sbatch", str(tmp_path / "none"), log=log, options=("--array=1",)),
    ]
    for job, task in zip(jobs, (1, 7, 1)):
        assert slurm.wait(f"{job}_{task}") == "FAILED"
    told = log.read_text(errors="replace")
    assert "look for a quote without its other one" in told
    assert "has 1 line(s) to train; submit with --array=1-N" in told
    assert "none: no such file" in told
