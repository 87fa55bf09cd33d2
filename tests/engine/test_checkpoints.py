"""Checkpoints are whole or not there, whatever happens, and do not depend on who wrote them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

import hdl.engine.checkpoints as module
from hdl.config import Save, Train
from hdl.engine.checkpoints import (
    FILES,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    Damaged,
    checkpoints,
    newest_good,
    prune,
    step_of,
    sweep,
    verify,
    write_checkpoint,
)
from hdl.engine.processes import Processes
from hdl.errors import HdlError
from tests.engine.forked import Server


def write(folder: Path, step: int) -> Path:
    tensors = {
        name: {f"t{i}": torch.full((3, 5), float(step)) for i in range(3)}
        for name in FILES
        if "safetensors" in name
    }
    texts = {name: json.dumps({"step": step}) for name in FILES if "safetensors" not in name}
    return write_checkpoint(folder, step, texts=texts, tensors=tensors)


def steps(folder: Path) -> list[int]:
    return [step_of(c) for c in checkpoints(folder)]


@pytest.mark.parametrize("name", sorted(FILES | {MANIFEST_FILE}))
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    told: list[str] = []
    assert newest_good(tmp_path, told.append) == tmp_path / "step-000002" and not told
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 7)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 0x41
        if name == MANIFEST_FILE and chr(whole[place]).isspace():
            continue
        file.write_bytes(spoiled)
        told.clear()
        assert newest_good(tmp_path, told.append) == tmp_path / "step-000001", place
        assert len(told) == 1 and "passed over" in told[0] and "step-000002" in told[0]
    file.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match="has .* bytes, expected|is not readable"):
        verify(file.parent)
    file.unlink()
    with pytest.raises(
        Damaged, match=f"{name} is not readable|has no {MANIFEST_FILE}, which is written last"
    ):
        verify(file.parent)
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(
        HdlError, match="holds no checkpoint that is whole: .*step-000002.*Remove .* to start over"
    ):
        newest_good(tmp_path, told.append)
    shutil.rmtree(tmp_path / "step-000002")
    assert newest_good(tmp_path, told.append) is None


class PowerCut(BaseException):
    pass


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Cut the power right before the n-th call that changes the disk."""
    left = [0]

    def counted(really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise PowerCut
            left[0] -= 1
            return really(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(
            os, "fsync", lambda descriptor: None
        )  # which takes its time, and is counted all the same
        for owner, name in [
            (module, "write_tensors"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename"), (os, "fsync"),
            (shutil, "rmtree"), (os, "unlink"),
        ]:  # fmt: skip
            patched.setattr(owner, name, counted(getattr(owner, name)))
        yield lambda calls: left.__setitem__(0, calls)
        left[0] = -1


def test_no_moment_is_a_bad_one_to_be_killed(tmp_path: Path, cut: Callable[[int], None]) -> None:
    """While the sixth checkpoint is written over a damaged one, and older ones go."""
    for calls in range(1000):
        cut(-1)
        folder = tmp_path / str(calls)
        folder.mkdir()
        for step in (1, 2, 3, 4, 6):
            write(folder, step)
        damaged = folder / "step-000006"
        (damaged / OPTIMIZER_FILE).write_bytes(b"cut")
        cut(calls)
        try:
            prune(folder, last=2, every=2, newest=write(folder, 6))
            ended = True
        except PowerCut:
            ended = False
        cut(-1)
        newest = newest_good(folder, lambda line: None)
        assert newest in (folder / "step-000004", folder / "step-000006"), calls
        for checkpoint in checkpoints(folder):
            if checkpoint != damaged:
                verify(checkpoint)
        sweep(folder)
        assert not list(folder.glob(".*"))
        if ended:
            assert steps(folder) == [6, 4, 2] and calls > 20
            return
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("last", "every", "stay"),
    [
        (None, None, [9, 7, 6, 4, 3, 2]),
        (1, None, [9]),
        (2, None, [9, 6]),
        (1, 3, [9, 6, 3]),
        (9, 2, [9, 6, 4, 3, 2]),
    ],
)
def test_which_checkpoints_stay(tmp_path: Path, last: int, every: int, stay: list[int]) -> None:
    """A damaged one does not count, and is the first to go."""
    for step in (2, 3, 4, 6, 7, 9):
        write(tmp_path, step)
    gone = prune(
        tmp_path, last=last, every=every, newest=tmp_path / "step-000009", damaged=[tmp_path / "step-000007"]
    )
    assert steps(tmp_path) == stay
    assert sorted([*map(step_of, gone), *stay]) == [2, 3, 4, 6, 7, 9]
    with pytest.raises(ValidationError, match="keep_every 5 needs keep_last"):
        Save(output=tmp_path, keep_every=5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs more rights: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_there_was(small_disk: Path) -> None:
    write(small_disk, 1)
    (small_disk / "other").write_bytes(b"x" * 24 * 2**10)
    with pytest.raises(Exception, match="No space left on device"):
        for step in range(2, 20):
            write(small_disk, step)
    good = steps(small_disk)
    assert 1 in good
    for checkpoint in checkpoints(small_disk):
        verify(checkpoint)


class Pair(nn.Module):
    """Named as an adapter's parameters; of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.ParameterDict(
            {"lora_A": torch.linspace(0.5, 1.5, 21).view(3, 7), "lora_B": torch.ones(5, 3)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.times["lora_B"] @ self.times["lora_A"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_full_state_is_what_deepspeed_says(group: Processes, tmp_path: Path, stage: int) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from hdl.engine.full_state import KINDS, WEIGHT, FullState
    from hdl.engine.moments import named_moments
    from hdl.engine.sharding import shard

    strategy = tmp_path / "zero.json"
    strategy.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    train = Train(batch_size=1, warmup_steps=0, deepspeed=strategy)
    engine = shard(Pair(), train, torch.float32, group)
    state = FullState(engine, holds=True)
    for step in range(3):
        state.refill().wait()
        if step == 0:
            assert not any(m.count_nonzero() for m in named_moments(state).values())
        for name, parameter in engine.module.named_parameters():
            for kind in KINDS if step else (WEIGHT,):
                theirs = (
                    safe_get_full_fp32_param(parameter)
                    if kind == WEIGHT
                    else safe_get_full_optimizer_state(parameter, kind)
                )
                assert torch.equal(state.named(kind)[name], theirs), (step, name, kind)
                assert theirs.count_nonzero() > 0
        engine.backward(engine(torch.full((2, 5), float(step + 1))).square().sum())
        engine.step()


# Resumes, and saves what it finds again, under the same name.
SAVED_AGAIN = """
import hdl.engine.loop as loop

def go(self):
    self.saver._begun = None
    self.saver.save(self.done, self.skipping.state(), None)
    self.saver.finish()
    return 0

loop.Loop.go = go
"""


def test_a_checkpoint_means_the_same_to_any_number_of_ranks(
    server: Server, described: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Written by two ranks of ZeRO-3; read and written again by one to four of either strategy, to the bit."""
    options = {"train__batch_size": 12, "train__steps": 2, "train__warmup_steps": 1}
    written = server.start(described("run", train__deepspeed="ds_configs/zero3.json", **options))
    assert written.wait() == 0, written.printed
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    moments = load_file(checkpoint / OPTIMIZER_FILE)
    assert any(m.count_nonzero() > 0 for m in moments.values())
    for world, stage in [(1, 2), (4, 2), (3, 3)]:
        arguments = described("run", train__deepspeed=f"ds_configs/zero{stage}.json", **options)
        again = server.start([*arguments, "--resume"], processes=world, first=SAVED_AGAIN)
        assert again.wait() == 0, again.printed
        assert "resuming after step 2" in again.printed
        for name, contents in before.items():
            if name.endswith(".safetensors") or name == "adapter_config.json":
                assert (checkpoint / name).read_bytes() == contents, (world, stage, name)


def test_damaged_checkpoints_are_passed_over_and_replaced(
    server: Server, described: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = server.start(described("run", train__steps=6, save__every=2), processes=1)
    assert run.wait() == 0, run.printed
    folder = tmp_path / "run/checkpoints"
    whole = (folder / "step-000006" / OPTIMIZER_FILE).read_bytes()
    spoiled = bytearray(whole)
    spoiled[-1] ^= 1
    (folder / "step-000006" / OPTIMIZER_FILE).write_bytes(spoiled)
    (folder / "step-000004" / OPTIMIZER_FILE).write_bytes(whole[:100])
    (folder / ".step-000009.partial").mkdir()
    arguments = described("run", train__steps=6, save__every=6, save__keep_last=2)
    resumed = server.start([*arguments, "--resume", "auto"], processes=1)
    assert resumed.wait() == 0, resumed.printed
    assert f"step-000006: {OPTIMIZER_FILE} is not what was written (its SHA-256 differs)" in resumed.printed
    assert f"step-000004: {OPTIMIZER_FILE} has 100 bytes, expected {len(whole)}" in resumed.printed
    assert "resuming after step 2" in resumed.printed
    assert {p.name for p in folder.iterdir()} == {
        "step-000002",
        "step-000006",
    }  # the damaged ones did not count
    assert (folder / "step-000006" / OPTIMIZER_FILE).read_bytes() == whole  # and it went on to the bit
