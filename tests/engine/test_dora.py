"""Runs with DoRA: its norms are trained, saved, resumed and drawn with like A and B, under ZeRO-2 and ZeRO-3."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hdl.config import load_run
from hdl.engine.fast_path import may_fuse
from hdl.errors import HdlError
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.sample.draw import draw_prompts
from hdl.sample.generate import SamplerSettings
from tests.engine.conftest import Launch
from tests.engine.test_runs import PICTURES, adapter, assert_same_losses

DORA = {"lora__dora": True, "train__schedule": "cosine"}
MAGNITUDE = "lora_magnitude_vector"


def forget_the_last_step(output: Path) -> None:
    for folder in ("checkpoints/step-000004", "adapter"):
        shutil.rmtree(output / folder)


def test_a_run_trains_norms_and_draws_what_it_drew(launch: Launch, tiny_base: Path) -> None:
    run = launch("dora", **DORA, **PICTURES)
    assert run.status == 0, run.printed
    assert "plain kernels: lora.dora needs" in run.printed and "DoRA rank 4" in run.printed
    trained = adapter(run)
    norms = {name: tensor for name, tensor in trained.items() if name.endswith(MAGNITUDE)}
    assert len(norms) == 28 and len(trained) == 3 * 28
    model = load_model(open_checkpoint(tiny_base), "cpu", torch.float32)
    for name, norm in norms.items():
        module = name.removeprefix("base_model.model.").removesuffix(f".{MAGNITUDE}")
        moved = (norm - model.get_parameter(f"{module}.weight").norm(dim=1)).abs()
        assert 1e-4 < moved.max() < 0.1, name  # where they start, and by what four steps can move them
    drawn = draw_prompts(
        tiny_base, PICTURES["validation__prompts"], SamplerSettings("full", 3, 5.0, 3.0),  # type: ignore[arg-type]
        seeds=range(3), adapter=run.output / "adapter", height=64, width=32, together=2, device="cpu",
    )  # fmt: skip
    sheet = np.asarray(Image.open(run.output / "pictures" / "step-000004.png"), int)
    first = np.asarray(Image.open(run.output / "pictures" / "step-000000.png"), int)
    assert np.abs(sheet - first).max() > 3
    for i, drawing in enumerate(drawn):
        enlarged = np.asarray(drawing.image.resize((96, 192), Image.Resampling.LANCZOS), int)
        top = 21 + i * (192 + 13 + 8)
        assert np.abs(sheet[top : top + 192, 112:208] - enlarged).max() <= 3


@pytest.mark.parametrize(("processes", "stage"), [(1, "zero2"), (2, "zero3")])
def test_resuming_is_bit_equal(launch: Launch, processes: int, stage: str) -> None:
    """With dropout, where DoRA multiplies the frozen weights itself, which ZeRO-3 then has to bring there."""
    options = {
        **DORA,
        "lora__dropout": 0.3,
        "processes": processes,
        "train__deepspeed": f"ds_configs/{stage}.json",
    }
    run = launch("run", **options)
    assert run.status == 0, run.printed
    whole = adapter(run)
    forget_the_last_step(run.output)
    resumed = launch("run", resume=True, **options)
    assert resumed.status == 0, resumed.printed
    again = adapter(resumed)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    moments = load_file(run.output / "checkpoints/step-000004/optimizer.safetensors")
    assert all(tensor.any() for name, tensor in moments.items() if MAGNITUDE in name)
    assert sum(MAGNITUDE in name for name in moments) == 2 * 28


def test_the_strategy_changes_nothing(launch: Launch) -> None:
    """Weights divided over ranks are DoRA's whole weights; and what one strategy saved, another goes on from."""
    whole = launch("whole", **DORA)
    assert whole.status == 0, whole.printed
    half = launch("half", processes=2, train__deepspeed="ds_configs/zero3.json", **DORA)
    assert half.status == 0, half.printed
    assert_same_losses(whole, half)
    forget_the_last_step(half.output)
    resumed = launch("half", resume=True, **DORA)
    assert resumed.status == 0, resumed.printed
    assert_same_losses(whole, resumed)


def test_pictures_come_first_where_weights_are_divided(launch: Launch) -> None:
    """Before any forward pass through the model's root, after which DeepSpeed would know what DoRA reads."""
    drawn = PICTURES | {"validation__prompts": ["coins"], "validation__steps": 1, "validation__drift": False}
    for stage in (2, 3):
        run = launch(f"zero{stage}", train__deepspeed=f"ds_configs/zero{stage}.json", train__steps=2, train__warmup_steps=1,
                     **DORA, **drawn)  # fmt: skip
        assert run.status == 0, run.printed
    sheets = [
        np.asarray(Image.open(run.output.parent / f"zero{stage}/pictures/step-000002.png"), int)
        for stage in (2, 3)
    ]
    assert np.abs(sheets[0] - sheets[1]).max() <= 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("kernels", "fused", "model.kernels fused: lora.dora needs each weight .*; use model.kernels auto"),
        (
            "weights",
            "fp8_once",
            "model.weights fp8_once needs the fused path, but lora.dora .*use model.weights full",
        ),
        ("stream", "2", "model.stream 2 needs the fused path, but lora.dora"),
    ],
)
def test_what_needs_the_fused_path_is_refused_before_anything_is_loaded(
    option: str, value: str, message: str
) -> None:
    flags = ["--model.base", "b", "--data.shards", "s", "--save.output", "o", "--lora.dora"]
    run = load_run([*flags, f"--model.{option}", value])
    for device in ("cpu", "cuda"):
        with pytest.raises(HdlError, match=message):
            may_fuse(run, torch.device(device))
    assert not may_fuse(load_run(flags), torch.device("cuda"))
