"""Whole runs with layers in host memory: the same losses, one copy a machine, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from hdl.config import Run
from hdl.engine import fast_path
from hdl.engine.fast_path import check_stream, may_fuse
from hdl.errors import HdlError
from hdl.memory.host import NAME
from hdl.o1.checkpoint import open_checkpoint
from tests.engine.conftest import REPOSITORY, Finished, Launch

FUSED = {"model__kernels": "fused", "validation__prompts": ["a cat"], "validation__height": 32,
         "validation__width": 32, "validation__steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def memo() -> list[Finished]:
    return []


def resident(launch: Launch, memo: list[Finished]) -> Finished:
    if not memo:
        memo.append(launch("resident", **FUSED))
        assert memo[0].status == 0, memo[0].printed
    return memo[0]


@pytest.mark.parametrize(("processes", "stream"), [(1, 4), (2, 3)])
def test_losses_are_those_of_a_resident_run(
    launch: Launch, memo: list[Finished], processes: int, stream: int
) -> None:
    """Ranks of a machine each bring in some of the layers, and find the others' beside them."""
    shared_memory = set(os.listdir("/dev/shm"))
    run = launch(processes=processes, model__stream=stream, **FUSED)
    assert run.status == 0, run.printed
    wanted = resident(launch, memo)
    for name in ("loss", "grad_norm"):
        assert run.curve(name) == pytest.approx(wanted.curve(name), rel=1e-4), name
    assert set(os.listdir("/dev/shm")) <= shared_memory


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_leaves_no_memory_behind(launch: Launch, tmp_path: Path, processes: int) -> None:
    assert launch("described", model__stream=5, **FUSED).status == 1  # for its config
    config = tmp_path / "described.toml"
    shared_memory = set(os.listdir("/dev/shm"))
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    output = tmp_path / "killed"
    options = ["--model.stream", "4", "--train.steps", "100000", "--save.output", str(output)]
    run = subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), "train.py", str(config), *options],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    ranks: dict[int, str] = {}
    try:
        deadline = time.monotonic() + 300
        while len(ranks) < processes or not list(output.glob("tensorboard/*")):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
            ranks = users_of_host_memory(str(output))
        assert len(set(ranks.values())) == 1, "all ranks map the same file"
    finally:
        for pid in [run.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
        run.wait()
    deadline = time.monotonic() + 30
    while users_of_host_memory(str(output)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not users_of_host_memory(str(output))
    assert set(os.listdir("/dev/shm")) <= shared_memory


def users_of_host_memory(argument: str) -> dict[int, str]:
    """Processes with this argument that map the weights' memory, and its inode."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and argument in (folder / "cmdline").read_text().split("\0"):
                maps = (folder / "maps").read_text().splitlines()
                found |= {int(folder.name): line.split()[4] for line in maps if NAME in line}
        except OSError:
            continue  # gone meanwhile, or another's
    return found


def test_more_layers_than_there_are(launch: Launch) -> None:
    run = launch(model__stream=5, model__kernels="fused")
    assert run.status == 1 and "model.stream 5: the model has 4 layers" in run.printed
    assert not run.output.exists()


def described(base: Path, **model: object) -> Run:
    nowhere = str(base / "nowhere")
    return Run.model_validate(
        {"model": {"base": base, **model}, "data": {"shards": nowhere}, "save": {"output": nowhere}}
    )


def test_only_the_fused_path_streams(tiny_base: Path) -> None:
    for kernels, reason in (("auto", "a CPU gains nothing"), ("plain", "model.kernels is plain")):
        run = described(tiny_base, stream=2, kernels=kernels)
        with pytest.raises(HdlError, match=f"model.stream 2 needs the fused path, but {reason}.*stream 0"):
            may_fuse(run, torch.device("cpu"))
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        described(tiny_base, stream=-1)


def test_more_than_the_host_has(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = described(tiny_base, stream=4, kernels="fused"), open_checkpoint(tiny_base).config
    check_stream(run, config, torch.float32)
    block = fast_path.streamed_bytes(config, "full", torch.float32)
    monkeypatch.setattr(fast_path, "available", lambda: (3 * block, "/proc/meminfo"))
    with pytest.raises(HdlError, match=r"model\.stream 4 keeps .* GiB .*/proc/meminfo.*at most 3 layers"):
        check_stream(run, config, torch.float32)
    check_stream(run, config, torch.bfloat16)
