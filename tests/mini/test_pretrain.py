"""Pretraining on a CPU, tiny: the loss falls and out comes a checkpoint that hdl and transformers load."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from hdl.mini.pretrain import Recipe, pretrain, warm_then_cosine
from hdl.mini.save import mini_config
from hdl.mini.show import draw_held_out, plot_curve
from hdl.o1.checkpoint import TOKEN_TABLE, expected_shapes, load_model, open_checkpoint
from hdl.o1.config import parse_config
from hdl.o1.prompt import PromptEncoder

TINY = mini_config(hidden=64, layers=2, heads=2, mlp=96)
RECIPE = Recipe(
    steps=60,
    minutes=1.0,
    batch=8,
    scenes=400,
    fresh_scenes=100,
    learning_rate=5e-3,
    log_every=10,
    watch_every=30,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    pretrain(folder, TINY, RECIPE, "cpu")
    return folder


def test_the_loss_falls(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "curve.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(10, 61, 10))
    assert float(rows[-1]["loss"]) < 0.75 * float(rows[0]["loss"])
    assert float(rows[-1]["x0 0.05"]) < float(rows[2]["x0 0.05"])


def test_the_checkpoint_has_the_published_form(trained: Path) -> None:
    checkpoint = open_checkpoint(trained)
    assert all(p.isfinite().all() for p in load_model(checkpoint, "cpu", torch.float32).parameters())
    encoder = PromptEncoder(checkpoint)
    ids = encoder.ids("kotonia style, a small red boat")
    assert encoder.embed(ids).shape == (len(ids), 64)
    assert AutoConfig.from_pretrained(trained).text_config.hidden_size == 64
    assert json.loads((trained / "config.json").read_text()) == TINY


def test_the_curve_becomes_a_picture(trained: Path, tmp_path: Path) -> None:
    plot_curve(trained / "curve.csv", tmp_path / "curve.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "curve.png")).reshape(-1, 3), axis=0)) > 8


def test_held_out_prompts_become_a_grid(trained: Path, tmp_path: Path) -> None:
    prompts = draw_held_out(
        trained, tmp_path / "grid.png", count=2, guidance_scale=2.0, steps=3, device="cpu"
    )
    assert len(prompts) == 2
    assert Image.open(tmp_path / "grid.png").size == (2 * 128 + 4, 128)


def test_a_slow_machine_stops_in_time(tmp_path: Path) -> None:
    hurried = Recipe(steps=10**6, minutes=0.02, batch=4, scenes=100, fresh_scenes=50)
    rows = pretrain(tmp_path, TINY, hurried, "cpu")
    assert rows[-1]["minutes"] < 1 and rows[-1]["rate"] < 0.2 * hurried.learning_rate
    assert (tmp_path / "model.safetensors").exists()


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [warm_then_cosine(progress, 0.1) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0])


def test_the_bundled_model_is_small_enough() -> None:
    shapes = expected_shapes(parse_config(mini_config()))
    assert TOKEN_TABLE in shapes
    assert 2 * sum(int(np.prod(shape)) for shape in shapes.values()) < 11.8e6  # bytes in bfloat16
