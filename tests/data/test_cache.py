"""The cache's promises, with small files and real processes: bounded, shared, and nothing half taken for whole."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hdl.data import cache as cache_module
from hdl.data.cache import Cache
from hdl.errors import HdlError

SIZE = 1000


def content(i: int) -> bytes:
    return bytes([i]) * SIZE


def record(i: int) -> dict[str, Any]:
    return {"file": f"shard-{i}.tar", "bytes": SIZE, "sha256": hashlib.sha256(content(i)).hexdigest()}


def fetcher(i: int) -> Callable[[int], None]:
    def fetch(file: int) -> None:
        os.pwrite(file, content(i), 0)

    return fetch


def read(cache: Cache, i: int) -> bytes:
    with cache.use(record(i), fetcher(i)) as file:
        return os.pread(file, SIZE + 1, 0)


def kept(cache: Cache) -> list[int]:
    there = {path.name for path in cache.folder.iterdir()} - {"lock"}
    known = {i: cache.path(record(i)).name for i in range(20)}
    assert there <= set(known.values())
    return [i for i, name in known.items() if name in there]


def test_the_one_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3 * SIZE + 10)
    for i in (1, 2, 3, 1, 4):
        assert read(cache, i) == content(i)
    assert kept(cache) == [1, 3, 4]
    cache.touch(record(3))
    read(cache, 5)
    assert kept(cache) == [3, 4, 5]


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2 * SIZE)
    with cache.use(record(1), fetcher(1)) as file:
        for i in (2, 3, 4):
            read(cache, i)
            assert kept(cache) == [1, i]
        assert os.pread(file, SIZE, 0) == content(1)
    read(cache, 5)
    assert kept(cache) == [4, 5]


def test_no_room_beside_what_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE", 0.1)
    cache = Cache(tmp_path, 2 * SIZE)
    with (
        cache.use(record(1), fetcher(1)),
        cache.use(record(2), fetcher(2)),
        pytest.raises(HdlError, match=r"no room for shard-3.tar .*2,000 of 2,000 bytes are files in use"),
    ):
        read(cache, 3)
    assert kept(cache) == [1, 2]


def test_what_earlier_runs_left_counts(tmp_path: Path) -> None:
    larger = Cache(tmp_path, 10 * SIZE)
    for i in range(8):
        read(larger, i)
    (tmp_path / "somebody's notes.txt").write_text("keep")
    Cache(tmp_path, 3 * SIZE)
    (tmp_path / "somebody's notes.txt").unlink()
    assert kept(larger) == [5, 6, 7]


def test_what_failed_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)

    def fails(file: int) -> None:
        os.pwrite(file, content(1)[:500], 0)
        raise HdlError("no more")

    with pytest.raises(HdlError, match="no more"), cache.use(record(1), fails):
        pass
    assert kept(cache) == []
    assert read(cache, 1) == content(1)


def test_a_file_that_was_cut_off_is_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    read(cache, 1)
    os.truncate(cache.path(record(1)), 10)
    assert read(cache, 1) == content(1)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 100 * SIZE)
    for i in (1, 2, 3):
        read(cache, i)

    def allocate(file: int, start: int, size: int) -> None:
        if sum(path.stat().st_size for path in tmp_path.iterdir()) + size > 3 * SIZE:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.truncate(file, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert read(cache, 4) == content(4)
    assert kept(cache) == [2, 3, 4]
    (tmp_path / "somebody's").write_bytes(bytes(3 * SIZE))
    with pytest.raises(HdlError, match=r"the disk is full .*no room to cache shard-5.tar of 1,000 bytes"):
        read(cache, 5)
    (tmp_path / "somebody's").unlink()
    assert kept(cache) == []


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100 * SIZE)

    def fills(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HdlError, match="the disk is full"), cache.use(record(1), fills):
        pass
    assert kept(cache) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HdlError, match="file/cache: cannot be used as a cache .*set data.cache"):
        Cache(tmp_path / "file" / "cache", SIZE)


SLOW = """
    import os, sys, time
    from pathlib import Path
    from hdl.data.cache import Cache
    folder, log, sha256, seconds = sys.argv[1:]
    def fetch(file):
        with open(log, "a") as lines:
            lines.write("fetched\\n")
        os.pwrite(file, bytes([1]) * 500, 0)
        print("half", flush=True)
        time.sleep(float(seconds))
        os.pwrite(file, bytes([1]) * 500, 500)
    record = {"file": "shard-1.tar", "bytes": 1000, "sha256": sha256}
    with Cache(Path(folder), 10_000).use(record, fetch) as file:
        assert os.pread(file, 2000, 0) == bytes([1]) * 1000
"""


def slow_process(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "cache"), str(tmp_path / "log"), record(1)["sha256"], str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), *arguments], stdout=subprocess.PIPE, text=True
    )


def test_processes_share_one_fetch(tmp_path: Path) -> None:
    processes = [slow_process(tmp_path, 0.5) for _ in range(3)]
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_a_process_killed_in_mid_fetch_leaves_nothing_that_counts_or_blocks(tmp_path: Path) -> None:
    process = slow_process(tmp_path, 60)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    cache = Cache(tmp_path / "cache", SIZE)
    part = cache.path(record(1)).with_suffix(".tar.part")
    assert part.stat().st_size == SIZE and not cache.path(record(1)).exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(cache, 1) == content(1)
    assert kept(cache) == [1]


def test_what_a_killed_process_left_is_removed_when_room_is_made(tmp_path: Path) -> None:
    process = slow_process(tmp_path, 60)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    assert len(list(cache.folder.glob("*.part"))) == 1  # alive: left alone
    process.send_signal(signal.SIGKILL)
    process.wait()
    read(cache, 2)
    assert kept(cache) == [2]
