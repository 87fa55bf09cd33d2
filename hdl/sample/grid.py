"""Pictures side by side, with a word on what they are."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN = 8
LINE = 13  # pixels from one line of text to the next
LETTER = 6  # about a letter's width in Pillow's built-in font
LONGEST_SIDE = 512  # of one picture in a grid
SHORTEST_SIDE = 192  # small pictures are enlarged, so that their labels find room


def picture_grid(rows: list[list[Tensor]], columns: list[str], labels: list[str]) -> Image.Image:
    """A labelled grid: rows of uint8 [H, W, 3] pictures of one size, a word a column, a text under each row."""
    height, width, _ = rows[0][0].shape
    longest = max(height, width)
    scale = min(max(longest, SHORTEST_SIDE), LONGEST_SIDE) / longest
    size = (round(width * scale), round(height * scale))
    across = (size[0] + MARGIN) * len(columns)
    texts = [textwrap.wrap(label, across // LETTER) for label in labels]
    down = [size[1] + LINE * len(text) + MARGIN for text in texts]
    sheet = Image.new("RGB", (across + MARGIN, LINE + MARGIN + sum(down)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, word in enumerate(columns):
        draw.text((MARGIN + c * (size[0] + MARGIN), 3), word, fill="black")
    top = LINE + MARGIN
    for pictures, text, step in zip(rows, texts, down):
        for c, picture in enumerate(pictures):
            tile = Image.fromarray(picture.numpy()).resize(size, Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + c * (size[0] + MARGIN), top))
        draw.multiline_text((MARGIN, top + size[1]), "\n".join(text), fill="black", spacing=1)
        top += step
    return sheet


def as_tensor(image: Image.Image) -> Tensor:
    """uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image.convert("RGB")))
