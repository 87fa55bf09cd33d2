"""Small pictures and image folders for the data tests."""

from pathlib import Path

import numpy as np
from PIL import Image

BASE = Path(__file__).parents[1] / "golden" / "o1-tiny"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels: any resampling, shift or reordering shows."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def put(folder: Path, name: str, caption: str | None = "a thing", image: Image.Image | None = None) -> Path:
    """An image of the given name (in a subfolder if the name says so) and its caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(64, 64, seed=len(name))).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path
