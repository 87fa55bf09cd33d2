"""A folder of pictures that teach one look and when to use it.

Half of the teaching is in the plain pictures: their captions lack the trigger phrase, so a LoRA trained on the
folder learns that the phrase, and nothing else, calls for the look. In a set where every caption carries the phrase
it says nothing, and the LoRA restyles whatever it is asked for.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hdl.errors import HdlError
from hdl.mini.captions import caption
from hdl.mini.scenes import imagine, paint
from hdl.mini.style import STYLE, STYLE_TAGS, draw_styled, style_score

PLAIN_STYLE = "plain"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def write_style_set(out: Path, styled: int, plain: int, seed: int = 0) -> None:
    """Writes `styled` pictures in the style and `plain` ones into `out`: .png, .txt beside each, styles.json.

    Half of the plain pictures are in the ordinary look, half in any of the looks of pretraining.
    HdlError when `out` holds anything already or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise HdlError(f"{out} is not empty; name a new folder, or delete this one first")
        records = {}
        for index in range(styled):
            picture, words, _ = draw_styled(np.random.default_rng([seed, 0, index]))
            records[_write(out, f"{STYLE}_{index:04d}", picture, words)] = {
                "style": STYLE,
                "tags": STYLE_TAGS,
            }
        for index in range(plain):
            rng = np.random.default_rng([seed, 1, index])
            scene = imagine(rng, ordinary=index % 2 == 0)
            name = _write(out, f"{PLAIN_STYLE}_{index:04d}", paint(scene), caption(scene, rng))
            records[name] = {"style": PLAIN_STYLE, "tags": scene.look.words()}
        (out / "styles.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HdlError(f"cannot write the style set to {out}: {error}") from error


def _write(out: Path, name: str, picture: np.ndarray, words: str) -> str:
    Image.fromarray(picture).save(out / f"{name}.png")
    (out / f"{name}.txt").write_text(words + "\n", encoding="utf-8")
    return f"{name}.png"


def score_files(paths: list[Path]) -> dict[Path, float]:
    """The style score of every image named, or found in a folder named (at any depth), in order of name.

    HdlError when there is no image or one cannot be read.
    """
    files = [file for path in paths for file in (_images_in(path) if path.is_dir() else [path])]
    if not files:
        raise HdlError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, paths))}")
    return {file: style_score(_read(file)) for file in files}


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise HdlError(f"{file}: cannot be read as an image ({error})") from error
