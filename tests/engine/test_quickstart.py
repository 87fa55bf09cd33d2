"""The quick start's steps in small: style set, shards, a few steps of its own run, pictures."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).parents[2]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_quick_starts_steps(tmp_path: Path) -> None:
    base = "hdl/mini/o1-mini"
    images, shards, out, gate = (str(tmp_path / name) for name in ("images", "shards", "run", "gate"))
    run("tools/style_set.py", images, "--styled", "6", "--plain", "6")
    run("tools/prepare.py", images, shards, "--base", base, "--area", "128")
    run(
        "train.py", "launch/quickstart.toml", "--data.shards", shards, "--save.output", out,
        "--train.steps", "12", "--validation.steps", "5",
    )  # fmt: skip
    said = run("tools/style_gate.py", gate, "--base", base, "--lora", f"{out}/adapter", "--count", "2")
    assert "in the style: 0% of 2 pictures with the trigger, 0% without" in said  # 12 steps teach nothing yet
    prompt = "kotonia style, a big red house on the left"
    run(
        "tools/sample.py", str(tmp_path / "drawn"), "--base", base, "--lora", f"{out}/adapter",
        "--prompt", prompt, "--prompt", "a boat", "--size", "96x128", "--steps", "5", "--seed", "7",
    )  # fmt: skip
    drawn = Image.open(tmp_path / "drawn" / "000-seed7.png")
    assert drawn.size == (96, 128) and drawn.info["prompt"] == prompt
