"""Pictures of a pretraining run: its curve, and what the model draws for prompts it was never shown."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hdl.mini.shapes import CANVAS
from hdl.mini.style import evaluation_prompts

COLUMNS = 8  # pictures a row
GAP = 4  # pixels
PLOT = (960, 480)  # pixels
MARGIN = 48
INKS = (
    (150, 150, 150),
    (20, 60, 160),
    (30, 120, 190),
    (40, 160, 140),
    (110, 170, 60),
    (220, 150, 30),
    (200, 60, 40),
)


def draw_held_out(
    folder: Path, out: Path, count: int, guidance_scale: float, steps: int, device: str
) -> list[str]:
    """Draws `count` held-out prompts with the checkpoint's own sampler into one PNG, row by row; returns the prompts."""
    from hdl.sample.draw import draw_prompts  # needs diffusers and PEFT, which pretraining does not
    from hdl.sample.generate import SamplerSettings

    prompts = evaluation_prompts(count)
    settings = SamplerSettings("full", steps, guidance_scale, shift=3.0)
    drawings = draw_prompts(
        folder, prompts, settings, seeds=range(count), height=CANVAS, width=CANVAS, together=count, device=device
    )  # fmt: skip
    sheet([np.asarray(drawing.image) for drawing in drawings]).save(out)
    return prompts


def sheet(pictures: list[np.ndarray]) -> Image.Image:
    """Pictures of one size, COLUMNS a row, on white."""
    height, width, _ = pictures[0].shape
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    paper = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        paper.paste(Image.fromarray(picture), (column * (width + GAP), row * (height + GAP)))
    return paper


def plot_curve(table: Path, out: Path) -> None:
    """Draws curve.csv: the training loss and the x0 error per noise level against steps, both axes' ends labelled.

    The error axis is logarithmic.
    """
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ["loss", *[name for name in rows[0] if name.startswith("x0 ")]]
    lines = {name: [(float(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}
    points = [point for line in lines.values() for point in line]
    last = max(step for step, _ in points)
    low, high = (np.log10(bound(error for _, error in points)) for bound in (min, max))
    paper = Image.new("RGB", PLOT, "white")
    pen = ImageDraw.Draw(paper)
    width, height = PLOT[0] - 2 * MARGIN, PLOT[1] - 2 * MARGIN

    def at(step: float, error: float) -> tuple[float, float]:
        up = (np.log10(error) - low) / max(high - low, 1e-9)
        return MARGIN + step / last * width, MARGIN + (1 - up) * height

    pen.rectangle([MARGIN, MARGIN, MARGIN + width, MARGIN + height], outline=(200, 200, 200))
    for place, (name, ink) in enumerate(zip(names, INKS, strict=True)):
        pen.line([at(*point) for point in lines[name]], fill=ink, width=2)
        label = "loss" if name == "loss" else f"error at sigma {name.removeprefix('x0 ')}"
        pen.text((MARGIN + width - 150, MARGIN + 8 + 14 * place), label, fill=ink)
    pen.text((4, MARGIN - 6), f"{10**high:.2g}", fill="black")
    pen.text((4, MARGIN + height - 6), f"{10**low:.2g}", fill="black")
    pen.text((MARGIN, MARGIN + height + 8), f"0 to {last:.0f} steps; mean squared error of x0", fill="black")
    paper.save(out)
