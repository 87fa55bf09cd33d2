"""Whole runs with a bfloat16 master: repeated, resumed, spread over ranks, and beside a float32 one."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.conftest import Finished, Launch


def adapter(run: Finished) -> dict[str, Tensor]:
    assert run.status == 0, run.printed
    return load_file(run.output / "adapter" / "adapter_model.safetensors")


def half_of(run: Finished, name: str) -> str:
    """A copy of a run as it was after its first checkpoint."""
    half = run.output.with_name(name)
    shutil.copytree(run.output, half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "adapter")
    return name


def test_runs_with_a_bfloat16_master(launch: Launch) -> None:
    """Repeatable to the bit, resumed to the bit, the same on one rank as on two, and nothing of it depends
    on the master that a checkpoint was made with."""
    options = {"model__dtype": "bfloat16", "train__master": "bfloat16", "lora__dropout": 0.3, "processes": 2}
    whole = launch("whole", **options)
    weights = adapter(whole)
    assert all(torch.equal(w, w.bfloat16().float()) for w in weights.values())
    resumed = launch(half_of(whole, "half"), resume=True, **options)
    assert "resuming after step 2" in resumed.printed
    assert all(torch.equal(w, weights[n]) for n, w in adapter(resumed).items())
    exact = launch(half_of(whole, "exact"), resume=True, **(options | {"train__master": "float32"}))
    assert any(not torch.equal(w, w.bfloat16().float()) for w in adapter(exact).values())
    assert exact.curve("loss")[3] == whole.curve("loss")[3]  # went on from the same weights
    back = launch(half_of(exact, "back"), resume=True, **options)
    assert all(torch.equal(w, weights[n]) for n, w in adapter(back).items())


def test_a_bfloat16_master_on_one_rank_and_on_two(launch: Launch) -> None:
    options = {"model__dtype": "bfloat16", "train__master": "bfloat16"}
    one, two = launch("one", **options), launch("two", processes=2, **options)
    exact = launch("exact", model__dtype="bfloat16")
    weights, others, masters = adapter(one), adapter(two), adapter(exact)
    for step in range(1, 5):
        for other in (two, exact):
            assert one.curve("loss")[step] == pytest.approx(other.curve("loss")[step], rel=1e-3), step
    for run in (others, masters):  # Adam's first steps amplify what differs in bfloat16 gradients
        errors = [float((w - run[n]).norm() / w.norm()) for n, w in weights.items()]
        assert max(errors) < 5e-2, max(errors)
