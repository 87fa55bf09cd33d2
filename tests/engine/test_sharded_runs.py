"""Whole runs whose frozen weights are shared out over two ranks: the same losses, also when one of them runs out of
memory (the allocator's error is made up)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.engine.fast_path import may_fuse
from hdl.errors import HdlError
from tests.engine.forked import Server
from tests.engine.test_streamed_runs import described as configured

Described = Callable[..., list[str]]
# Two micro-batches a step on each rank, pictures and measurements in between.
SETTINGS = {
    "model__kernels": "fused", "lora__dropout": 0.0, "train__steps": 4, "train__batch_size": 8,
    "train__micro_batch_size": 2, "data__held_out": 0.3, "validation__held_out_samples": 3, "validation__every": 2,
    "validation__height": 32, "validation__width": 32, "validation__steps": 2, "validation__prompts": '["a cat"]',
}  # fmt: skip


def curves(output: Path) -> list[list[float]]:
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return [
        [event.value for event in events.Scalars(name)] for name in ("loss", "grad_norm", "held_out/loss")
    ]


@pytest.fixture(scope="module")
def memo() -> dict[str, list[list[float]]]:
    return {}


def resident(
    server: Server, described: Described, tmp_path: Path, memo: dict[str, list[list[float]]]
) -> list[list[float]]:
    if not memo:
        job = server.start(described("resident", **SETTINGS))
        assert job.wait() == 0, job.printed
        memo["resident"] = curves(tmp_path / "resident")
        assert [len(curve) for curve in memo["resident"]] == [4, 4, 3]
    return memo["resident"]


def test_losses_are_those_of_a_resident_run(
    server: Server, described: Described, tmp_path: Path, memo: dict[str, list[list[float]]]
) -> None:
    job = server.start(described("sharded", model__shard=4, **SETTINGS))
    assert job.wait() == 0, job.printed
    for found, wanted in zip(curves(tmp_path / "sharded"), resident(server, described, tmp_path, memo)):
        assert found == pytest.approx(wanted, rel=1e-5)


# Rank 1 alone fails, once, in its second step's second micro-batch.
FAILING = """
import os
import torch
from hdl.{module} import {owner} as owner

plain, calls = owner.{name}, 0

def failing(*arguments, **options):
    global calls
    calls += 1
    if calls == {at} and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    return plain(*arguments, **options)

owner.{name} = failing
"""
# What fails when it is called which time: in the fourth micro-batch, the third layer of four. Two measurements of
# held-out samples come before.
PLACES = {
    "before": ("data", "batches.Batch", "to", 6),
    "forward": ("memory", "offload.InPlace", "put", 15),
    "after": ("engine", "step", "_measured", 4),
    "backward": ("kernels", "layer", "backward", 15),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_a_rank_that_runs_out_of_memory_takes_its_pass_again_and_the_others_wait(
    place: str, server: Server, described: Described, tmp_path: Path, memo: dict[str, list[list[float]]]
) -> None:
    room, owner, name, at = PLACES[place]
    module, _, cls = owner.partition(".")
    first = FAILING.format(module=f"{room}.{module}" if cls else room, owner=cls or module, name=name, at=at)
    job = server.start(described("failing", model__shard=3, **SETTINGS), first=first)
    assert job.wait(120) == 0, job.printed
    assert job.printed.count("taken again with more recomputation") == 1
    assert "rank 1, step 2: out of memory" in job.printed
    for found, wanted in zip(curves(tmp_path / "failing"), resident(server, described, tmp_path, memo)):
        assert found == pytest.approx(wanted, rel=1e-5)


PRESERVING = SETTINGS | {"data__trigger": "a photograph"}


@pytest.mark.parametrize("place", [None, "base", "after"])
def test_the_bases_pass_is_taken_together_too(
    place: str | None,
    server: Server,
    described: Described,
    tmp_path: Path,
    memo: dict[str, list[list[float]]],
) -> None:
    """Also where one rank has no kept sample, and where one runs out of memory in it, or after it."""
    if "preserving" not in memo:
        job = server.start(described("preserving", **PRESERVING))
        assert job.wait() == 0, job.printed
        memo["preserving"] = curves(tmp_path / "preserving")
        assert memo["preserving"][0] != resident(server, described, tmp_path, memo)[0]
    first = ""
    if place:
        name, at = {"base": ("base_prediction", 2), "after": ("_measured", 4)}[place]
        first = FAILING.format(module="engine", owner="step", name=name, at=at)
    job = server.start(described("failing", model__shard=3, **PRESERVING), first=first)
    assert job.wait(120) == 0, job.printed
    assert job.printed.count("taken again with more recomputation") == (place is not None)
    for found, wanted in zip(curves(tmp_path / "failing"), memo["preserving"]):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_needs_several_processes(server: Server, described: Described, tmp_path: Path) -> None:
    job = server.start(described("alone", model__shard=4, **SETTINGS), processes=1)
    assert (
        job.wait() == 1 and "model.shard 4 shares weights out over the processes of a machine" in job.printed
    )
    assert not (tmp_path / "alone").exists()


def test_more_layers_than_there_are(server: Server, described: Described) -> None:
    job = server.start(described("deep", **SETTINGS | {"model__shard": 5}))
    assert job.wait() == 1 and "model.shard 5: the model has 4 layers" in job.printed


def test_only_the_fused_path_shards(tiny_base: Path, tmp_path: Path) -> None:
    run = configured(tiny_base, shard=2, kernels="plain")
    with pytest.raises(HdlError, match=r"model\.shard 2 needs the fused path, but model\.kernels is plain"):
        may_fuse(run, torch.device("cpu"))


@pytest.mark.parametrize("other", [{"stream": 2}, {"offload": 3}, {"memory": "auto"}])
def test_what_it_cannot_be_combined_with(tiny_base: Path, other: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="shard 2"):
        configured(tiny_base, shard=2, **other)
