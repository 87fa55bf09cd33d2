"""Pictures side by side, with a word on what they are."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN = 8
LABEL_HEIGHT = 16
LONGEST_SIDE = 512  # of one picture in a grid


def picture_grid(rows: list[list[Tensor]], columns: list[str], labels: list[str]) -> Image.Image:
    """A labelled grid: rows of uint8 [H, W, 3] pictures of one size, a word a column, a line a row."""
    height, width, _ = rows[0][0].shape
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = (round(width * scale), round(height * scale))
    cell = (size[0] + MARGIN, size[1] + LABEL_HEIGHT + MARGIN)
    sheet = Image.new("RGB", (cell[0] * len(columns) + MARGIN, cell[1] * len(rows) + LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for c, word in enumerate(columns):
        draw.text((MARGIN + c * cell[0], 2), word, fill="black")
    for r, pictures in enumerate(rows):
        top = LABEL_HEIGHT + r * cell[1]
        letters = int(cell[0] * len(columns) / 6)  # of Pillow's built-in font
        draw.text((MARGIN, top + size[1] + 1), labels[r][:letters], fill="black")
        for c, picture in enumerate(pictures):
            tile = Image.fromarray(picture.numpy()).resize(size, Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + c * cell[0], top))
    return sheet


def as_tensor(image: Image.Image) -> Tensor:
    """uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image.convert("RGB")))
