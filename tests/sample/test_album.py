"""What tools/sample.py draws, how it names it, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdl.adapter.lora import adapter_parameters, attach, save_adapter
from hdl.adapter.stack import Weighted
from hdl.config import Lora
from hdl.errors import HdlError
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.sample.album import Album, columns_of
from hdl.sample.draw import Studio, Wanted
from hdl.sample.generate import SamplerSettings
from hdl.sample.path import PathOptions
from hdl.sample.sizes import NATIVE, parse_size

FAST = SamplerSettings("full", steps=3, guidance_scale=5.0, shift=3.0)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two strong adapters for the tiny base."""
    base = Path(__file__).parents[1] / "golden" / "o1-tiny"
    folders = []
    for seed in (1, 2):
        adapted = attach(
            load_model(open_checkpoint(base), "cpu", torch.float32), Lora(rank=2), str(base), seed
        )
        generator = torch.Generator().manual_seed(seed)
        weights = {
            n: torch.randn(p.shape, generator=generator) for n, p in adapter_parameters(adapted).items()
        }
        folders.append(tmp_path_factory.mktemp("loras") / f"look{seed}")
        save_adapter(adapted, weights, folders[-1])
    return folders


def pixels(file: Path | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(file) if isinstance(file, Path) else file, int)


def test_columns() -> None:
    two = {"a": Weighted(Path("a"), 0.8), "b": Weighted(Path("b"), 0.5)}
    assert [c.label for c in columns_of(two, [1.0], False)] == ["a 0.8 + b 0.5"]
    compared = columns_of(two, [0.5, 1.0], True)
    assert [dict(c.weights) for c in compared] == [
        {}, {"a": 0.8}, {"b": 0.5}, {"a": 0.4, "b": 0.25}, {"a": 0.8, "b": 0.5},
    ]  # fmt: skip
    assert [dict(c.weights) for c in columns_of({}, [1.0], False)] == [{}]
    with pytest.raises(HdlError, match="strength: weight 0, expected a finite number other than 0"):
        columns_of(two, [0.0], False)


def test_a_grid_of_prompts_seeds_and_adapters(tmp_path: Path, tiny_base: Path, loras: list[Path]) -> None:
    out = tmp_path / "out"
    line = [
        sys.executable, "tools/sample.py", str(out), "--base", str(tiny_base), "--lora", f"{loras[0]}:0.5",
        "--lora", str(loras[1]), "--compare", "--prompt", "a fox", "--prompt", "deux “chats”", "--seeds", "2",
        "--size", "64x32", "--steps", "3", "--together", "3",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16 pictures and grid.png" in done.stdout and "does not say which base" in done.stdout
    assert len(list(out.glob("*.png"))) == 17
    picture = Image.open(out / "001-seed1-3.png")
    assert picture.size == (64, 32) and picture.info["prompt"] == "deux “chats”"
    about = json.loads(picture.info["hdl"])
    assert about["seed"] == 1 and about["adapters"] == {"look1": 0.5, "look2": 1.0}
    assert about["settings"]["steps"] == 3 and about["base"].startswith("sha256:")

    # Each is what would be drawn alone, so switching left nothing of the column before.
    for column, adapters in enumerate([{}, {"look1": 0.5}, {"look2": 1.0}, {"look1": 0.5, "look2": 1.0}]):
        studio = Studio(tiny_base, "cpu", adapters=dict(zip(("look1", "look2"), loras)))
        [drawn] = studio.draw([Wanted("deux “chats”", 1, 32, 64, adapters)], FAST)
        assert np.abs(pixels(drawn.image) - pixels(out / f"001-seed1-{column}.png")).max() <= 1
    different = [pixels(out / f"000-seed0-{column}.png") for column in range(4)]
    assert all(np.abs(a - b).max() > 20 for i, a in enumerate(different) for b in different[:i])

    with pytest.raises(HdlError, match=r"grid\.png is already there; nothing was drawn"):
        Album(out, ["a fox"], [0], columns_of({}, [1.0], False), width=32, height=32)


def test_streamed_and_fp8_layers_draw_nearly_the_same(
    tiny_base: Path, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are read straight into their form; adapters go on and off over them. Unguided and with a weak adapter:
    the random base makes anything of stronger ones."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    unguided = replace(FAST, guidance_scale=1.0)
    wanted = [
        Wanted(prompt, seed, 64, 96, adapters)
        for adapters in ({}, {"look": 0.005})
        for seed, prompt in enumerate(["a fox", "two foxes at sea"])
    ]
    plain, streamed, fp8 = (
        [
            pixels(drawing.image)
            for drawing in Studio(tiny_base, "cpu", adapters={"look": loras[0]}, options=options).draw(
                wanted, unguided, 2
            )
        ]
        for options in (PathOptions(), PathOptions(stream=3, kernels="fused"), PathOptions("fp8"))
    )
    for one, same, near in zip(plain, streamed, fp8):
        assert np.abs(same - one).max() <= 1
        assert 0.05 < np.abs(near - one).mean() < 10
    assert np.abs(plain[2] - plain[0]).mean() > 20


def test_the_tool_takes_the_decoders_options(tmp_path: Path, tiny_base: Path) -> None:
    def draw(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable, "tools/sample.py", str(tmp_path / name), "--base", str(tiny_base), "--prompt", "a fox",
            "--size", "32x32", "--steps", "1", *more,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(line, capture_output=True, text=True, env=environment)

    done = draw("out", "--weights", "fp8", "--stream", "2", "--kernels", "fused")
    assert done.returncode == 0, done.stderr
    about = json.loads(Image.open(tmp_path / "out" / "000-seed0.png").info["hdl"])
    assert about["weights"] == "fp8"
    refused = draw("no", "--stream", "9", "--kernels", "fused")
    assert refused.returncode == 1 and "stream 9: the model has" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_form_is_the_studios_own(tiny_base: Path) -> None:
    """No weight of the decoder's layers is there in full beside it."""
    studio = Studio(tiny_base, "cpu", options=PathOptions(weights="fp8"))
    layers = studio.model.get_submodule("model.language_model.layers")
    full = [
        m
        for m in layers.modules()
        if isinstance(m, torch.nn.Linear) and m.weight.untyped_storage().size() > 4
    ]
    assert not full


def test_bad_wishes_are_refused_before_anything_is_drawn(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio(tiny_base, "cpu")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("drew")

    monkeypatch.setattr("hdl.sample.draw.generate", never)
    good = Wanted("a fox", 0, 32, 32)
    for bad, message in (
        (Wanted("a fox", 0, 48, 32), "size 32x48: expected positive multiples of 32"),
        (Wanted("a fox", 0, 32, -32), "size -32x32"),
        (Wanted("word " * 5000, 0, 32, 32), "is too long"),
        (
            Wanted("a fox", 0, 32, 32, {}, (Path("nowhere.png"),)),
            "reference nowhere.png: the file cannot be read",
        ),
    ):
        with pytest.raises(HdlError, match=message):
            studio.draw([good, bad], FAST)
    with pytest.raises(HdlError, match="no prompts"):
        studio.draw([], FAST)
    with pytest.raises(HdlError, match="together 0"):
        studio.draw([good], FAST, 0)


def test_sizes() -> None:
    assert parse_size("2560x1440") == (2560, 1440) and parse_size(" 64X96") == (64, 96)
    assert parse_size("16:9") == (2560, 1440) and parse_size("3:4") == (1728, 2304)
    assert parse_size("1:1") == (2048, 2048)
    assert all(width % 32 == height % 32 == 0 for width, height in NATIVE) and len(set(NATIVE)) == 11
    for bad, message in (
        ("1000x1024", "expected multiples of 32; 992x1024 is near"),
        ("0x32", "above 0"), ("-32x32", "expected WIDTHxHEIGHT"), ("large", "expected WIDTHxHEIGHT"),
    ):  # fmt: skip
        with pytest.raises(HdlError, match=message):
            parse_size(bad)
