"""From a checkpoint on disk to packed weights: how fast, and how much host memory on the way.

The checkpoint is random weights of a config's shapes, written once in the published form. Before every load the
machine is made to forget what it has read of the files, so that the disk is asked; how fast that is by itself is
measured beside it.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hdl.bench.card_run import Figures
from hdl.memory.cache import FORMS
from hdl.memory.host import GIB
from hdl.o1.checkpoint import INDEX_FILE, RandomCheckpoint

CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Load:
    """A form of the weights, and whether a cache is made, read or neither."""

    weights: str
    cache: str | None = None

    @property
    def name(self) -> str:
        return self.weights + (f", cache {self.cache}" if self.cache else "")


LOADS = (
    Load("full"), Load("fp8_once"), Load("fp8_once", "made"), Load("fp8_once", "read"), Load("nf4"),
    Load("nf4", "made"), Load("nf4", "read"),
)  # fmt: skip


def write_checkpoint(config: Path, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """In the published form, a file a decoder layer and one for the rest; nothing if the folder has one."""
    if (folder / INDEX_FILE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.read_text())
    drawn = RandomCheckpoint(folder)
    files: dict[str, list[str]] = {}
    for name in drawn.entries:
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in files.items():
        save_file({n: w.cpu() for n, w in drawn.read_all(names, device, dtype)}, folder / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / INDEX_FILE).write_text(json.dumps(index))  # last: a folder without one is unfinished


def evict(folder: Path) -> int:
    """Let the machine forget what it knows of these files; their bytes."""
    size = 0
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            size += os.fstat(handle).st_size
        finally:
            os.close(handle)
    return size


def disk_rate(folder: Path, files: int = 4) -> float:
    """Bytes a second of reading a few files from one end to the other, by one thread."""
    evict(folder)
    size, start = 0, time.perf_counter()
    for file in sorted(folder.rglob("*.safetensors"))[:files]:
        with file.open("rb", buffering=0) as opened:
            while read := len(opened.read(CHUNK)):
                size += read
    return size / (time.perf_counter() - start)


def read_bytes(load: Load, base: Path, cache: Path) -> int:
    """What such a load reads, about: the base without the token table, or the cache."""
    if load.cache == "read":
        folders = cache.glob(f"{FORMS[load.weights]}-*")
        return sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    return sum(file.stat().st_size for file in base.glob("model-*.safetensors") if "rest" not in file.name)


def as_markdown(found: dict[Load, tuple[Figures, int]], disk: float) -> str:
    lines = [
        f"disk, one thread: {disk / 1e9:.2f} GB/s",
        "",
        "| weights | seconds | GB read | GB/s | host GiB at the peak | kept |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [as_row(load, figures, size) for load, (figures, size) in found.items()])


def as_row(load: Load, figures: Figures, size: int) -> str:
    return (
        f"| {load.name} | {figures.loading:.1f} | {size / 1e9:.1f} | {size / 1e9 / figures.loading:.2f} | "
        f"{figures.host_peak / GIB:.2f} | {figures.host_kept / GIB:.2f} |"
    )
