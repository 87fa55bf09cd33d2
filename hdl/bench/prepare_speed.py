"""How fast images become shards, beside a loop that only opens, converts and resizes them with Pillow.

Both sides work on the same files, to the same sizes, on the same number of processes and on this machine in
turn; the plain loop writes nothing, reads no captions and hashes nothing. Files are made here from a seed:
photographs of a camera's size with its detail and grain, or many tiny pictures, which show what each image costs
beside its pixels. They lie in the page cache then: no disk is measured.
"""

import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hdl.bench.plain_loop import open_convert_resize
from hdl.data.buckets import PATCH, choose_bucket
from hdl.data.pictures import BUNDLE
from hdl.data.prepare import Options, prepare
from hdl.data.workers import in_order

BASE = Path(__file__).parents[1] / "mini" / "o1-mini"
DISTINCT = 4  # photographs made; the others are copies under other names, which prepare does not notice
WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "old",
    "new",
    "house",
    "cat",
    "dog",
    "tree",
    "river",
    "sky",
    "window",
    "light",
    "dark",
    "portrait",
    "standing",
    "under",
    "by",
    "of",
]
OCTAVES = 7


def measure(
    folder: Path,
    *,
    images: int = 64,
    width: int = 4000,
    height: int = 3000,
    area: int = 1024,
    workers: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """JPEGs of width x height px to buckets of `area`, in a `folder` that is made anew.

    images_a_second: through prepare into shards on `workers` processes beside the one that writes, starting them
    included; plain_images_a_second: the Pillow loop on as many; ratio of the two; file_bytes: of a JPEG. With _cpu:
    of processor time, of all these processes together.
    """
    shutil.rmtree(folder, ignore_errors=True)
    photographs = make_photographs(folder / "images", images, width, height, seed)
    rows, cols = choose_bucket(width, height, area, allow_upscaling=False)
    jobs = [(path, (str(path), cols * PATCH, rows * PATCH)) for path in photographs]
    start = clocks()
    for _ in in_order(open_convert_resize, iter(jobs), workers):
        pass
    plain, plain_cpu = (images / seconds for seconds in since(start))
    start = clocks()
    summary = prepare(folder / "images", folder / "shards", BASE, options=Options(area), workers=workers)
    ours, ours_cpu = (summary.new / seconds for seconds in since(start))
    return {
        "images": summary.new,
        "size": [width, height],
        "bucket": [cols * PATCH, rows * PATCH],
        "file_bytes": photographs[0].stat().st_size,
        "workers": workers,
        "images_a_second": ours,
        "plain_images_a_second": plain,
        "ratio": ours / plain,
        "images_a_second_cpu": ours_cpu,
        "plain_images_a_second_cpu": plain_cpu,
        "ratio_cpu": ours_cpu / plain_cpu,
    }


def measure_many(folder: Path, *, images: int = 100_000, workers: int = 2, seed: int = 0) -> dict[str, Any]:
    """PNGs of 32 to 64 px with captions, in a `folder` that is made anew: seconds to prepare them, and again when
    nothing has changed; plain_seconds: of the Pillow loop that opens and converts them; ratio: of plain to new. With
    _cpu: of processor time. peak_bytes: the most memory this process ever had, so let it be a fresh one."""
    shutil.rmtree(folder, ignore_errors=True)
    names = make_tiny(folder / "images", images, seed)
    start = clocks()
    jobs = ((name, (str(name), PATCH, PATCH)) for name in names)
    for _ in in_order(open_convert_resize, jobs, workers, weight=lambda job: 1 / BUNDLE):
        pass
    plain, seconds = since(start), []
    for _ in range(2):
        start = clocks()
        summary = prepare(folder / "images", folder / "shards", BASE, workers=workers)
        seconds.append(since(start))
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "images": summary.reused,
        "workers": workers,
        "seconds_new": seconds[0][0],
        "seconds_unchanged": seconds[1][0],
        "plain_seconds": plain[0],
        "ratio": plain[0] / seconds[0][0],
        "seconds_new_cpu": seconds[0][1],
        "seconds_unchanged_cpu": seconds[1][1],
        "plain_seconds_cpu": plain[1],
        "ratio_cpu": plain[1] / seconds[0][1],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
    }


def clocks() -> tuple[float, float]:
    """Seconds by the clock, and of processor time of this process and its children that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Both, from `clocks` until now."""
    by_clock, by_cpu = clocks()
    return by_clock - start[0], max(by_cpu - start[1], 0.01)  # the system counts in hundredths


def make_photographs(folder: Path, count: int, width: int, height: int, seed: int) -> list[Path]:
    """JPEGs with a caption each."""
    folder.mkdir(parents=True)
    paths = [folder / f"{i:04}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        if i < DISTINCT:
            photograph(width, height, seed + i).save(path, quality=90)
        else:
            shutil.copy(paths[i % DISTINCT], path)
        path.with_suffix(".txt").write_text(
            f"photograph number {i}, of hills and clouds in the evening light"
        )
    return paths


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Shapes of all sizes, as in nature the larger the stronger, and a camera's grain."""
    draw = np.random.default_rng(seed)
    small = (max(1, width // 4), max(1, height // 4))
    picture = np.zeros((small[1], small[0], 3), np.float32)
    for octave in range(OCTAVES):
        side = 2**octave
        shape = (small[1] // side + 2, small[0] // side + 2)
        for channel in range(3):
            values = Image.fromarray(draw.normal(size=shape).astype(np.float32))
            picture[..., channel] += np.asarray(values.resize(small, Image.Resampling.BICUBIC)) * side**0.8
    picture = (picture - picture.mean()) / picture.std() * 50 + 128
    smooth = Image.fromarray(picture.clip(8, 247).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = draw.integers(0, 17, (height, width, 3), np.uint8)
    return Image.fromarray(np.asarray(smooth) + grain - np.uint8(8))


def make_tiny(folder: Path, count: int, seed: int) -> list[Path]:
    """Small PNGs with a caption each, a thousand a subfolder."""
    draw = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        path = folder / f"{i // 1000:04}" / f"{i:07}.png"
        if i % 1000 == 0:
            path.parent.mkdir(parents=True)
        width, height = (int(side) for side in draw.integers(PATCH, 2 * PATCH + 1, 2))
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, compress_level=1)
        words = (WORDS[word] for word in draw.integers(0, len(WORDS), 12))
        path.with_suffix(".txt").write_text(f"picture {i}: {' '.join(words)}")
        paths.append(path)
    return paths
