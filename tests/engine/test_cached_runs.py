"""Whole runs that keep their packed weights on disk, and options that cannot work together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hdl.config import Run
from hdl.engine.fast_path import check_layers, may_fuse
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from tests.engine.conftest import Launch

CPU = torch.device("cpu")


def described(base: Path, **model: object) -> Run:
    nowhere = str(base / "nowhere")
    return Run.model_validate(
        {"model": {"base": base, **model}, "data": {"shards": nowhere}, "save": {"output": nowhere}}
    )


def test_the_second_start_reads_what_the_first_one_made(launch: Launch, tmp_path: Path) -> None:
    """Two ranks, of which the first writes the resident layers and each its share of the streamed ones."""
    settings: dict[str, Any] = {
        "model__kernels": "fused", "model__weights": "fp8_once", "model__stream": 3, "processes": 2,
        "train__steps": 2,
    }  # fmt: skip
    without = launch("without", **settings)
    first = launch("first", model__cache=tmp_path / "cache", **settings)
    second = launch("second", model__cache=tmp_path / "cache", **settings)
    assert without.status == first.status == second.status == 0, first.printed + second.printed
    assert without.curve("loss") == first.curve("loss") == second.curve("loss")
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [f"layer-0{i}.safetensors" for i in range(4)]
    assert f"from {folder}, " in first.printed and "0 made from the base" in second.printed


def test_a_folder_that_cannot_be_written_to(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = described(tiny_base, cache=tmp_path / "file" / "cache", weights="fp8_once", kernels="fused")
    with pytest.raises(HdlError, match=r"model\.cache .*file/cache: cannot be written to"):
        may_fuse(run, CPU)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"cache": "c"}, "of no use with weights full"),
        ({"cache": "c", "random_init": True, "weights": "nf4"}, "random_init draws its own"),
        ({"offload": 2}, "two layers always stay; offload 0 or at least 3"),
        ({"offload": -1}, "greater than or equal to 0"),
    ],
)
def test_what_would_do_nothing(tiny_base: Path, model: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        described(tiny_base, **model)
    described(tiny_base, cache="c", memory="auto")  # the plan may choose a form that is kept


def test_offloading_needs_a_gpu_and_the_fused_path(tiny_base: Path) -> None:
    run = described(tiny_base, offload=4, kernels="fused")
    with pytest.raises(HdlError, match=r"model\.offload 4 moves activations off a CUDA GPU.*on the CPU"):
        may_fuse(run, CPU)
    plain = described(tiny_base, offload=4, kernels="plain")
    with pytest.raises(HdlError, match=r"model\.offload 4 needs the fused path, but model.kernels is plain"):
        may_fuse(plain, torch.device("cuda"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"stream": 5}, "model.stream 5: the model has 4 layers; stream at most"),
        ({"offload": 5}, "model.offload 5: the model has 4 layers; offload at most"),
        ({"keep": ["input"] * 3}, "model.keep has 3 words, the model 4 layers"),
    ],
)
def test_more_layers_than_there_are(tiny_base: Path, model: dict[str, object], said: str) -> None:
    run: Run = described(tiny_base, **model)
    with pytest.raises(HdlError, match=said):
        check_layers(run, open_checkpoint(tiny_base).config)
