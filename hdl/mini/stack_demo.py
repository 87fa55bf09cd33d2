"""A look, a character and a content tag on the small O1 at once: trained apart, drawn together, counted.

    python -m hdl.mini.stack_demo runs/stack

Trains three LoRAs as launch/quickstart.sh does (some minutes each on a CPU; one that is already there is kept), then
draws scenes that no training picture shows with every adapter alone, every pair, all and none, asked for with every
trigger, every pair, all and none. What a picture shows is read off it by hdl/mini/taught.py. Writes shown.txt,
changes.txt and stack.png.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hdl.adapter.interplay import Some, asking, change, disturbance, groups, label, table
from hdl.errors import HdlError, command_line
from hdl.mini.captions import caption
from hdl.mini.shapes import CANVAS
from hdl.mini.taught import CHARACTER, LOOK, TAG, TRIGGERS, evaluation_scenes, read_picture, write_set
from hdl.sample.draw import Studio, Wanted
from hdl.sample.generate import SamplerSettings
from hdl.sample.grid import as_tensor, picture_grid

ROOT = Path(__file__).parents[2]
BASE = ROOT / "hdl/mini/o1-mini"
NAMES = (LOOK, CHARACTER, TAG)
PICTURES = 144  # with the trigger, and as many without
STEPS = 300
# Unguided, as in hdl/mini/gate.py; 20 steps are enough to tell what is in a picture.
SETTINGS = SamplerSettings("full", steps=20, guidance_scale=1.0, shift=3.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8, help="scenes, each drawn in all 64 ways (default 8)")
    args = parser.parse_args()
    for seed, what in enumerate(NAMES):
        if not (args.out / what / "run" / "adapter").is_dir():
            teach(args.out / what, what, seed)
    print(measure(args.out, args.count, "cuda" if torch.cuda.is_available() else "cpu"))


def teach(out: Path, what: str, seed: int) -> None:
    """Draw a set, prepare it and train on it. Each has its own seed, or all would start from the same A."""
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"DS_ACCELERATOR": "cpu"}
    write_set(out / "images", what, PICTURES, PICTURES)
    for command in (
        ["tools/prepare.py", out / "images", out / "shards", "--base", BASE, "--area", CANVAS],
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", "launch/quickstart.toml",
         "--data.shards", out / "shards", "--save.output", out / "run", "--train.seed", seed,
         *(part for every in ("--train.steps", "--save.every", "--validation.every") for part in (every, STEPS))],
    ):  # fmt: skip
        absolute = [str(part.resolve() if isinstance(part, Path) else part) for part in command]
        if subprocess.run([sys.executable, *absolute], cwd=ROOT, env=environment).returncode:
            raise HdlError(f"{' '.join(absolute)} failed; its messages are above")


def measure(out: Path, count: int, device: str) -> str:
    """Draw everything, write it to `out`, and return the numbers as text."""
    studio = Studio(BASE, device, adapters={what: out / what / "run" / "adapter" for what in NAMES})
    scenes = evaluation_scenes(count)
    prompts = [caption(scene, np.random.default_rng([i, 0x57AC])) for i, scene in enumerate(scenes)]
    some: list[Some] = [*groups(NAMES), NAMES]
    cells = [(on, asked) for on in some for asked in some]
    wanted = [
        Wanted(asking(prompt, asked, TRIGGERS), i, CANVAS, CANVAS, dict.fromkeys(on, 1.0))
        for on, asked in cells
        for i, prompt in enumerate(prompts)
    ]
    drawn = [as_tensor(drawing.image) for drawing in studio.draw(wanted, SETTINGS, together=8 * count)]
    pictures = {cell: drawn[i * count : (i + 1) * count] for i, cell in enumerate(cells)}
    read = {cell: [read_picture(p.numpy(), s) for p, s in zip(of, scenes)] for cell, of in pictures.items()}
    shown = "\n\n".join(
        table(
            {cell: 100 * float(np.mean([getattr(r, what) for r in of])) for cell, of in read.items()},
            f"{what} %: on \\ asked",
        )
        for what in NAMES
    )
    changes = "\n\n".join(
        (
            table(change(pictures), "changed by: on \\ asked"),
            table({((a,), (b,)): v for (a, b), v in disturbance(pictures).items()}, "changed: whose \\ by"),
        )
    )
    (out / "shown.txt").write_text(shown + "\n", encoding="utf-8")
    (out / "changes.txt").write_text(changes + "\n", encoding="utf-8")
    save_grid(pictures, out / "stack.png")
    return f"{shown}\n\n{changes}\n\npictures: {out / 'stack.png'}"


def save_grid(pictures: dict[tuple[Some, Some], list[Tensor]], file: Path) -> None:
    """The first scene with none, each and all on, asked for with none, each and the two that are not a look."""
    alone: list[Some] = [group for group in groups(NAMES) if len(group) < 2]
    across: list[Some] = [*alone, (CHARACTER, TAG)]
    down: list[Some] = [*alone, NAMES]
    rows = [[pictures[on, asked][0] for asked in across] for on in down]
    titles = [", ".join(TRIGGERS[name] for name in asked) or "no trigger" for asked in across]
    grid = picture_grid(rows, titles, [f"adapters on: {label(on)}" for on in down])
    # Few colours, so that the file stays small; an octree keeps the rare ones, such as a heart's red.
    grid.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    command_line(main)
