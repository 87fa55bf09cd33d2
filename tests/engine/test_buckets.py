"""The bucket in which DeepSpeed gathers gradients: as large as is needed, and of no effect on what is learned."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hdl.adapter.flat import FLAT
from hdl.engine.sharding import LARGEST_BUCKET, bucket_size
from tests.engine.conftest import REPOSITORY, Launch


def model_with(flat: int | None, *others: int) -> nn.Module:
    model = nn.Module()
    for i, size in enumerate(others):
        model.register_parameter(f"p{i}", nn.Parameter(torch.empty(size, device="meta")))
    if flat:
        model.register_parameter(FLAT, nn.Parameter(torch.empty(flat, device="meta")))
    return model


@pytest.mark.parametrize(
    ("flat", "others", "elements"),
    [(87_293_952, (), 1), (1000, (30, 7), 37), (None, (30, 7), 37), (None, (10**9, 5), LARGEST_BUCKET)],
    ids=["the flat adapter", "and others", "plain modules", "large ones"],
)
def test_it_holds_what_has_to_be_gathered(flat: int | None, others: tuple[int, ...], elements: int) -> None:
    model = model_with(flat, *others)
    assert bucket_size(model, list(model.parameters())) == elements


TWO = r".*(q_proj|x_embedder\.proj1)"


@pytest.mark.parametrize(
    ("processes", "options"),
    [(1, {}), (2, {}), (2, {"train__micro_batch_size": 1}), (2, {"lora__targets": TWO})],
    ids=["alone", "two ranks", "accumulated", "beside other gradients"],
)
def test_the_same_steps_as_with_a_large_bucket(
    launch: Launch, tmp_path: Path, processes: int, options: dict[str, object]
) -> None:
    strategy = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    assert "reduce_bucket_size" not in strategy["zero_optimization"], "it is hdl's to choose"
    large = tmp_path / "large.json"
    strategy["zero_optimization"]["reduce_bucket_size"] = LARGEST_BUCKET // 1000
    large.write_text(json.dumps(strategy))
    settings = {"processes": processes, "model__kernels": "fused", **options}
    ours, theirs = launch("ours", **settings), launch("theirs", train__deepspeed=large, **settings)
    assert ours.status == theirs.status == 0, ours.printed + theirs.printed
    for name in ("loss", "grad_norm"):
        assert ours.curve(name) == theirs.curve(name), name
