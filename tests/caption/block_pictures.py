"""Small pictures of coloured blocks, each its own."""

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("a.png", "b.jpg", "c.png", "sub/d.webp")


def put(folder: Path, name: str, seed: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((96, 64), Image.Resampling.NEAREST).save(path)
