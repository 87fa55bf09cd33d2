"""What earlier runs left in a folder of shards that a new run can take over, found without holding it in memory.

The lines of the finished run lie in its samples file, those of an unfinished one in `unfinished.jsonl`: first the
lines of a shard's samples, then one with the shard's record, once it is whole. Of each line only its place and 64
bits of a hash are kept, 20 bytes a sample.
"""

import hashlib
import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hdl.data.index import VERSION
from hdl.data.samples import SampleInfo, info_from_json
from hdl.data.shards import read_checked
from hdl.errors import HdlError

UNFINISHED_FILE = "unfinished.jsonl"


@dataclass(frozen=True)
class Known:
    """A sample of an earlier run, and its line as it stands in the file, without the newline."""

    info: SampleInfo
    line: bytes


@dataclass
class _Lines:
    """A file of lines. It stays open: what it held can be read also after it was removed."""

    path: Path
    descriptor: int = field(init=False)

    def __post_init__(self) -> None:
        self.descriptor = os.open(self.path, os.O_RDONLY)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self.descriptor, end - start, start)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Earlier:
    """Samples of earlier runs in shards that are whole.

    shards: file name -> its record in the index. finished: sorted hashes (`short_hash`) of the images that the
    last finished run has samples of; one_finished: the name of one of them.
    """

    def __init__(self) -> None:
        self.shards: dict[str, dict[str, Any]] = {}
        self.finished = np.empty(0, np.uint64)
        self.one_finished: str | None = None
        self._files: list[_Lines] = []
        self._spans: dict[str, tuple[int, int, int]] = {}  # shard -> file, start and end of its lines
        self._columns = [array("Q"), array("B"), array("Q"), array("I")]  # recipe, file, start, length
        self._recipes, self._order = np.empty(0, np.uint64), np.empty(0, np.int64)

    def find(self, source: str, recipe: str) -> Known | None:
        """The sample that was made of an image by a recipe; of several, that of the last run."""
        wanted = np.uint64(short_hash(f"{source}\0{recipe}"))
        place = int(np.searchsorted(self._recipes, wanted, side="right")) - 1
        while place >= 0 and self._recipes[place] == wanted:
            i = self._order[place]
            _, files, starts, lengths = self._columns
            line = self._files[files[i]].read(starts[i], starts[i] + lengths[i])
            info = info_from_json(line.decode())
            if (info.source, info.recipe) == (source, recipe) and info.shard in self.shards:
                return Known(info, line)
            place -= 1
        return None

    def lines_of(self, shard: str) -> bytes:
        file, start, end = self._spans[shard]
        return self._files[file].read(start, end)

    def _add(self, file: int, start: int, line: bytes) -> SampleInfo:
        info = info_from_json(line.decode())
        recipes, files, starts, lengths = self._columns
        recipes.append(short_hash(f"{info.source}\0{info.recipe}"))
        files.append(file)
        starts.append(start)
        lengths.append(len(line))
        return info

    def _read_finished(self, path: Path, records: list[dict[str, Any]]) -> None:
        self._files.append(_Lines(path))
        self.shards = {record["file"]: record for record in records}
        sources = array("Q")
        start = 0
        with open(path, "rb") as file:
            for line in file:
                info = self._add(0, start, line[:-1])
                sources.append(short_hash(info.source))
                self.one_finished = self.one_finished or info.source
                _, begin, _ = self._spans.get(info.shard, (0, start, 0))
                start += len(line)
                self._spans[info.shard] = (0, begin, start)
        self.finished = np.unique(np.frombuffer(sources, np.uint64))

    def _read_unfinished(self, path: Path) -> None:
        self._files.append(_Lines(path))
        number = len(self._files) - 1
        begin = start = 0
        pending: list[tuple[int, bytes]] = []
        with open(path, "rb") as file:
            for line in file:
                place, start = start, start + len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # the line that was being written when the run was killed
                    record = {}
                if "recipe" in record:
                    pending.append((place, line[:-1]))
                    continue
                if record.get("version") == VERSION:
                    self.shards[record["shard"]["file"]] = record["shard"]
                    self._spans[record["shard"]["file"]] = (number, begin, place)
                    for where, sample in pending:
                        self._add(number, where, sample)
                begin, pending = start, []

    def _finish(self, folder: Path) -> None:
        for name, record in list(self.shards.items()):
            path = folder / name
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                del self.shards[name]
        recipes = np.frombuffer(self._columns[0], np.uint64) if self._columns[0] else self._recipes
        self._order = np.argsort(recipes, kind="stable")
        self._recipes = recipes[self._order]


def read_earlier(folder: Path, index: dict[str, Any] | None) -> Earlier:
    """What the finished run (its index, if any) and an unfinished one left in `folder`."""
    earlier = Earlier()
    if index:
        try:
            read_checked(folder, index["samples"])
        except HdlError:  # without its list nothing of the finished run can be taken over: make it all anew
            pass
        else:
            earlier._read_finished(folder / index["samples"]["file"], index["shards"])
    if (folder / UNFINISHED_FILE).is_file():
        earlier._read_unfinished(folder / UNFINISHED_FILE)
    earlier._finish(folder)
    return earlier


def short_hash(text: str) -> int:
    """64 bits of a hash, the same in every process."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
