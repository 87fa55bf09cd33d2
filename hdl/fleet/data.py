"""The shards that a machine's GPUs are measured on: random pixels, and captions of so many tokens.

    python -m hdl.fleet.data OUT [--tiny]

Equal images are all of one size and caption length; mixed ones come twice in each of the bench's aspect ratios
(hdl/bench/cases.py), with captions from few tokens to many. Noise takes a PNG encoder seconds and gets no smaller, so
the images are stored as they are.
"""

import argparse
import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hdl.bench.cases import RATIOS
from hdl.data.prepare import Options, prepare
from hdl.errors import command_line
from hdl.fleet.rows import CONFIG_8B, EQUAL, MINI, MIXED, shards_of, size_of
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.prompt import PromptEncoder

EQUAL_IMAGES = 8
LONGEST = 4096  # words that a caption could have
TOKENIZER = ("tokenizer*", "*.jinja", "vocab.json", "merges.txt", "*tokens*.json")

Drawn = tuple[int, int, int]  # width, height in pixels; tokens of the caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    size, base = size_of(args.tiny), MINI
    if not args.tiny:
        base = args.out / "base"
        base.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CONFIG_8B, base / "config.json")
        for pattern in TOKENIZER:
            for file in MINI.glob(pattern):
                shutil.copyfile(file, base / file.name)
    encoder = PromptEncoder(open_checkpoint(base, random_init=True))
    sets: dict[str, tuple[int, Iterator[Drawn]]] = {
        EQUAL: (size.side, iter([(size.side, size.side, size.text)] * EQUAL_IMAGES)),
        MIXED: (size.mixed_side, mixed(size.mixed_side, size.texts)),
    }
    for name, (side, drawn) in sets.items():
        shards = shards_of(args.out, name)
        images = shards.with_name("images")
        write(images, encoder, drawn)
        summary = prepare(images, shards, base, random_init=not args.tiny, options=Options(area=side))
        print(f"{name}: {summary.taken} images in {shards}", file=sys.stderr)


def mixed(side: int, texts: tuple[int, int]) -> Iterator[Drawn]:
    """Every ratio once with a short caption and once with a long one, at about side² pixels."""
    fewest, most = texts
    count = 2 * len(RATIOS)
    for i in range(count):
        wide, high = RATIOS[i % len(RATIOS)]
        scale = side / (wide * high) ** 0.5
        place = i if i < len(RATIOS) else count + len(RATIOS) - 1 - i  # of its caption, from the shortest on
        yield round(wide * scale), round(high * scale), round(fewest + (most - fewest) * place / (count - 1))


def write(folder: Path, encoder: PromptEncoder, drawn: Iterator[Drawn]) -> None:
    """Images, and beside each the longest caption of no more than its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (width, height, tokens) in enumerate(drawn):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)
        words = bisect_right(range(1, LONGEST), tokens, key=lambda n: len(encoder.ids(caption(n))))
        (folder / f"{i}.txt").write_text(caption(max(words, 1)) + "\n", encoding="utf-8")


def caption(words: int) -> str:
    return " ".join(["sea"] * words)


if __name__ == "__main__":
    command_line(main)  # type: ignore[arg-type]
