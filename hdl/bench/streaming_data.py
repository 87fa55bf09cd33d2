"""Shards over a network that fails: one epoch from a server that works and from one that does not.

Synthetic shards are served on this machine by a process of its own, held to a rate, without and then with
faults (hdl/bench/shard_server.py). The reader goes through the shards as training does: a window of them at a
time in a shuffled order, what comes after it fetched ahead as far as the cache holds it. Every sample must come exactly once with its bytes.
"""

import hashlib
import os
import random
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hdl.bench.shard_server import Faults, in_a_process
from hdl.data.cache import LOCK_FILE, locked
from hdl.data.earlier import Earlier
from hdl.data.samples import Prompt, SampleInfo, hash_of_captions, hash_of_embeds, payload_of
from hdl.data.shard_writer import ShardWriter
from hdl.data.shards import CacheOptions, Shards
from hdl.o1.patches import PATCH

FAULTS = Faults(error=0.05, stall=0.01, truncate=0.02, damage=0.01)
PATCH_BYTES = 3 * PATCH * PATCH


def measure(
    folder: Path,
    *,
    shards: int = 100,
    samples: int = 10,
    side: int = 16,
    rate: float | None = 50e6,
    faults: Faults = FAULTS,
    window: int = 16,
    cached_shards: float = 64,
    stall: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Read an epoch of `shards` with `samples` of side² patches each from a server of `rate` bytes a second, clean
    and with faults. cached_shards: what the cache holds, in shards. stall: as of `CacheOptions`, in seconds.

    Returns mb_per_s of each and their ratio, and of each run what failed, the most the cache took in bytes with
    its bound, resident MiB before and the most while reading, and the samples that were wrong, twice or missing.
    """
    made = folder / "shards"
    sums = write_shards(made, shards, samples, side, seed)
    bound = cached_shards * (made / next(made.glob("shard-*.tar")).name).stat().st_size
    result: dict[str, Any] = {
        "shards": shards, "bytes": sum(path.stat().st_size for path in made.glob("shard-*.tar")),
        "rate": rate, "faults": asdict(faults), "stall_s": stall, "cache_bound": int(bound),
    }  # fmt: skip
    for name, kinds in (("clean", Faults()), ("faulty", faults)):
        with in_a_process(made, kinds, rate) as url, tempfile.TemporaryDirectory(dir=folder) as cache:
            options = CacheOptions(Path(cache), bound / 2**30, stall=stall)
            result[name] = read_epoch(url, options, sums, window, seed)
    result["ratio"] = result["faulty"]["mb_per_s"] / result["clean"]["mb_per_s"]
    return result


def read_epoch(
    url: str, options: CacheOptions, sums: dict[str, int], window: int, seed: int
) -> dict[str, Any]:
    """Every sample once, `window` shards at a time in an order drawn from the seed. sums: key -> CRC of patches."""
    before = resident_mib()
    started = time.perf_counter()
    data = Shards(url, cache=options)
    draw = random.Random(seed)
    members: dict[str, list[int]] = {}
    for i, info in enumerate(data.infos):
        members.setdefault(info.shard, []).append(i)
    names = list(members)
    draw.shuffle(names)
    seen: dict[str, int] = {}
    wrong, read, resident = 0, 0, before
    with watched(options.folder) as most:
        for first in range(0, len(names), window):
            data.prefetch(names[first:])
            mixed = [i for name in names[first : first + window] for i in members[name]]
            draw.shuffle(mixed)
            for i in mixed:
                sample = data.read(i)
                seen[sample.key] = seen.get(sample.key, 0) + 1
                wrong += zlib.crc32(sample.patches.numpy().data) != sums[sample.key]
                read += sample.patches.numel()
            resident = max(resident, resident_mib())
    seconds = time.perf_counter() - started
    return {
        "mb_per_s": read / seconds / 1e6, "seconds": seconds, "samples": len(seen),
        "wrong": wrong, "twice": sum(n > 1 for n in seen.values()), "missing": len(sums.keys() - seen.keys()),
        "failures": data.failures, "cache_most": most[0], "resident_before": before, "resident_most": resident,
    }  # fmt: skip


def write_shards(out: Path, shards: int, samples: int, side: int, seed: int) -> dict[str, int]:
    """Shards of random patches as tools/prepare.py would write them; key -> CRC of each sample's patches."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    prompt = Prompt(torch.arange(8), torch.zeros(8, 64, dtype=torch.bfloat16))
    size = len(payload_of([prompt], torch.zeros(side * side, PATCH_BYTES, dtype=torch.uint8)))
    writer = ShardWriter(out, Earlier(), shard_bytes=samples * (size + 4096))
    sums = {}
    for i in range(shards * samples):
        patches = draw.integers(0, 256, (side * side, PATCH_BYTES), dtype=np.uint8)
        payload = payload_of([prompt], torch.from_numpy(patches))
        info = SampleInfo(
            key=f"{i:08d}", shard="", offset=0, size=len(payload), sha256=hashlib.sha256(payload).hexdigest(),
            rows=side, cols=side, references=[], text_tokens=[8], captions=[f"picture {i}"], mirrored=False,
            caption_sha256=hash_of_captions([f"picture {i}"]), embeds_sha256=hash_of_embeds([prompt]),
            source=f"{i:08d}.png", view=None, style=None, tags=[], note=None, image_sha256="0" * 64,
            recipe="0" * 64,
        )  # fmt: skip
        writer.add(info, payload)
        sums[info.key] = zlib.crc32(patches.data)
    writer.finish({"fingerprint": "synthetic", "hidden_size": 64}, {}, payload_of([prompt]), 8)
    return sums


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """[the most bytes that the folder's files took together], looked at every 10 ms."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            file = locked(folder / LOCK_FILE)  # so that nothing changes between one file and the next
            try:
                total = 0
                for path in folder.glob("*.*"):
                    with suppress(FileNotFoundError):  # a fetch was given up
                        total += path.stat().st_size
                most[0] = max(most[0], total)
            finally:
                os.close(file)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20
