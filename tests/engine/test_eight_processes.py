"""Eight processes train the small O1 as one does: the losses of the same global batch in float32, with weights that every
process has whole and with weights that are shared out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hdl.data.prepare import Options, prepare
from hdl.study.measures import BASE
from tests.engine.forked import Server
from tests.engine.test_sharded_runs import curves

SETTINGS = {
    "model__base": BASE, "model__kernels": "fused", "lora__dropout": 0.0, "train__steps": 3, "train__batch_size": 16,
    "train__warmup_steps": 1, "train__micro_batch_size": 1, "data__held_out": 0.3, "validation__held_out_samples": 8,
    "validation__every": 3, "train__patience": 120.0,
}  # fmt: skip


def test_losses_are_those_of_one(
    server: Server, described: Callable[..., list[str]], photos: Path, tmp_path: Path
) -> None:
    prepare(photos, tmp_path / "shards", BASE, options=Options(area=128))
    settings = SETTINGS | {"data__shards": tmp_path / "shards"}
    found = {}
    for name, processes, shard in (("one", 1, 0), ("whole", 8, 0), ("shared", 8, 6)):
        job = server.start(described(name, model__shard=shard, **settings), processes=processes)
        assert job.wait() == 0, job.printed
        found[name] = curves(tmp_path / name)
    assert [len(curve) for curve in found["one"]] == [3, 3, 2]
    for name in ("whole", "shared"):
        for here, wanted in zip(found[name], found["one"]):
            assert here == pytest.approx(wanted, rel=1e-5)
