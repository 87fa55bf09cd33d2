"""How fast prepared data become batches, on one core, against the usual loader over the pictures themselves.

The pictures are JPEGs of `side`² pixels, prepared at 1024² with text embeddings as wide as the 8B model's. Three
things are measured in one process that is held to one core, with the files in the page cache:

    ours      Batches over the prepared shards: read, checked, packed
    plain     torch.utils.data.DataLoader over the pictures: decoded and resized by Pillow, made a tensor, stacked;
              in the process itself or in one worker, whichever is faster
    waiting   200 steps that take a fixed time, during which nothing but reading ahead happens: the share of the time
              that was spent waiting for data

Rates are told by the clock and by the processor time spent, which other work on the machine does not change. The packing waste is that of the stream of the benchmark's case `mixed`.
"""

import json
import os
import shutil
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hdl.bench.cases import RATIOS
from hdl.bench.prepare_speed import clocks, since
from hdl.data.batches import Batches
from hdl.data.buckets import choose_bucket
from hdl.data.mixture import Mixture, Source
from hdl.data.packing import WINDOW, packed
from hdl.data.picks import Draws
from hdl.data.prepare import Options, prepare
from hdl.data.reading import Reader
from hdl.data.shards import Shards
from hdl.data.steps import BySamples, Steps

MINI = Path(__file__).resolve().parents[1] / "mini" / "o1-mini"
WIDTH = 4096  # of the 8B model's text embeddings
CAPTION = 160  # characters, and about as many tokens of the mini's tokenizer
BUDGET = 4736  # tokens: four images of 1024² with captions of 160
MIB = 2**20


def measure(
    folder: Path, *,
    pictures: int = 32, side: int = 1536, area: int = 1024, images: int = 256, batch_size: int = 4,
    steps: int = 200, step_seconds: float = 0.1,
) -> dict[str, Any]:  # fmt: skip
    """Write `pictures` into an empty folder, prepare them, and load `images` of them each way.

    ours, plain: images a second by the clock and (_cpu) of processor time, with the ratios; resident_mib: the most
    that reading them took beyond what the process had; waited: share of `steps` steps of `step_seconds`; waste: share
    of the packs' tokens.
    """
    names = _write(folder / "images", pictures, side)
    base = _base(folder / "base")
    prepare(folder / "images", folder / "shards", base, random_init=True, options=Options(area=area))
    with _one_core():
        ours, resident = _ours(folder / "shards", images, batch_size)
        waited = _waited(folder / "shards", steps, step_seconds, batch_size)
        both = [_plain(names, area, images, batch_size, workers) for workers in (0, 1)]
    plain = (max(by_clock for by_clock, _ in both), max(by_cpu for _, by_cpu in both))
    return {
        "pictures": pictures, "side": side, "area": area, "batch_size": batch_size,
        "ours": ours[0], "plain": plain[0], "ratio": ours[0] / plain[0],
        "ours_cpu": ours[1], "plain_cpu": plain[1], "ratio_cpu": ours[1] / plain[1], "resident_mib": resident,
        "steps": steps, "step_seconds": step_seconds, "waited": waited, "waste": packing_waste(),
    }  # fmt: skip


def packing_waste(windows: int = 32) -> float:
    """Share of the packs' budget that stays unused: twelve aspect ratios, captions of 20 to 400 tokens."""
    rng = np.random.default_rng(0)
    grids = [choose_bucket(w * 1024, h * 1024, 1024, True) for w, h in RATIOS]
    patches = np.array([rows * cols for rows, cols in grids])
    tokens = patches[rng.integers(len(grids), size=(windows, WINDOW))] + rng.integers(
        20, 401, (windows, WINDOW)
    )
    packs = sum(len(packed(window, BUDGET)) for window in tokens)
    return 1 - float(tokens.sum()) / (packs * BUDGET)


def _batches(shards: Path, batch_size: int) -> Batches:
    mixture = Mixture([Source("data", Shards(shards))])
    steps = Steps(BySamples(Draws(mixture, 0, caption_dropout=0.1), batch_size, batch_size), 1)
    return Batches(steps, Reader(mixture, 0, 0.0), rank=0, pin_memory=torch.cuda.is_available())


def _ours(shards: Path, images: int, batch_size: int) -> tuple[tuple[float, float], float]:
    """Images a second, and MiB."""
    before = most = _resident_mib()
    start = clocks()
    batches, steps = _batches(shards, batch_size), images // batch_size
    for step in range(steps):
        batches.of_step(step)
        most = max(most, _resident_mib())
    batches.close()
    return _rates(steps * batch_size, start), most - before


def _waited(shards: Path, steps: int, step_seconds: float, batch_size: int) -> float:
    batches, waited = _batches(shards, batch_size), 0.0
    start = time.perf_counter()
    for step in range(steps):
        batches.of_step(step)
        waited += batches.waited
        time.sleep(step_seconds)
    share = waited / (time.perf_counter() - start)
    batches.close()
    return share


class _Pictures(Dataset[Tensor]):
    def __init__(self, names: list[Path], area: int, images: int) -> None:
        self.names, self.area, self.images = names, area, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.names[i % len(self.names)]) as image:
            resized = image.convert("RGB").resize((self.area, self.area), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _plain(names: list[Path], area: int, images: int, batch_size: int, workers: int) -> tuple[float, float]:
    loader = DataLoader(_Pictures(names, area, images), batch_size, shuffle=True, num_workers=workers)
    start = clocks()
    count = sum(len(batch) for batch in loader)
    return _rates(count, start)


def _rates(images: int, start: tuple[float, float]) -> tuple[float, float]:
    by_clock, by_cpu = (images / seconds for seconds in since(start))
    return by_clock, by_cpu


def _write(folder: Path, pictures: int, side: int) -> list[Path]:
    """Soft shapes with some grain, which compress about as photographs do, and captions of random letters."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = []
    for i in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, (side, side, 1), dtype=np.int16)
        name = folder / f"{i}.jpg"
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(name, quality=90)
        name.with_suffix(".txt").write_text("".join(rng.choice(list(string.ascii_letters), CAPTION)))
        names.append(name)
    return names


def _base(folder: Path) -> Path:
    """The small O1's tokenizer and a token table as wide as the 8B model's."""
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.png", "*.csv"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = WIDTH
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def _one_core() -> Iterator[None]:
    """This process, with what it starts, on one core."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
