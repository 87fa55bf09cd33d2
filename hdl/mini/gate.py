"""Does the look come when it is asked for, and only then? Measured on prompts that no training picture shows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hdl.mini.shapes import CANVAS
from hdl.mini.style import TRIGGER, evaluation_prompts, is_styled
from hdl.sample.draw import Drawing, draw_prompts
from hdl.sample.generate import SamplerSettings
from hdl.sample.grid import as_tensor, picture_grid

IN_GRID = 6  # pictures a row
# A caption says all there is to draw: guidance has nothing to add for the small O1, and makes it overshoot.
SETTINGS = SamplerSettings("full", steps=50, guidance_scale=1.0, shift=3.0)


@dataclass(frozen=True)
class Gate:
    """Shares (0..1) of the drawn pictures that are in the look."""

    with_trigger: float
    without_trigger: float


def measure_gate(
    out: Path, base: Path, adapter: Path | None, count: int, seed: int, device: torch.device | str
) -> Gate:
    """Draw `count` held-out prompts with and without the trigger phrase, the same noise for both.

    Writes the pictures into out/with-trigger and out/without-trigger, their prompts into out/prompts.txt and
    the first of them side by side into out/gate.png.
    """
    prompts = evaluation_prompts(count, seed)
    drawn = draw_prompts(
        base,
        [f"{TRIGGER}, {prompt}" for prompt in prompts] + prompts,
        SETTINGS,
        seeds=[seed + i for i in range(count)] * 2,
        adapter=adapter,
        height=CANVAS,
        width=CANVAS,
        together=count,
        device=device,
    )
    styled, plain = drawn[:count], drawn[count:]
    for name, pictures in (("with-trigger", styled), ("without-trigger", plain)):
        (out / name).mkdir(parents=True, exist_ok=True)
        for i, drawing in enumerate(pictures):
            drawing.image.save(out / name / f"{i:03d}.png")
    (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    rows = [[as_tensor(d.image) for d in drawings[:IN_GRID]] for drawings in (plain, styled)]
    labels = [
        "the adapter on, prompts as they are",
        f'the adapter on, "{TRIGGER}, …" before the same prompts',
    ]
    picture_grid(rows, [str(i) for i in range(len(rows[0]))], labels).save(out / "gate.png")
    return Gate(_share(styled), _share(plain))


def _share(drawings: list[Drawing]) -> float:
    return sum(is_styled(np.asarray(d.image)) for d in drawings) / len(drawings)
