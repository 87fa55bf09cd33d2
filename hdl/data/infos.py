"""The list of samples, of any length: a file of JSON lines of which memory holds only where each begins.

Unusual: a million samples are more than a gigabyte of JSON and several of objects, so a line is parsed when
it is asked for. The file stays open and is read by offset (pread), which forked processes may share; it can
be removed meanwhile without harm. A pickled copy opens it anew by its path.
"""

import hashlib
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from hdl.data.samples import SampleInfo, info_from_json
from hdl.errors import HdlError

BLOCK = 1 * 2**20  # bytes scanned at once
AT_ONCE = 256  # lines parsed at once by an iteration

# How `info_to_json` begins a line.
PLACE = re.compile(rb'{"key": "[^"\\]*", "shard": "([^"\\]*)", "offset": (\d{1,18}), "size": (\d{1,18}),')


class WrongBytes(HdlError):
    """A file that is not the one the index lists."""


class Infos(Sequence[SampleInfo]):
    """`SampleInfo`s by index, slice or iteration.

    path: the samples file; record: its record in the index (bytes, sha256, count); shards: name -> bytes of
    each. file: the file where it is open already; closed with this.
    Raises HdlError where its bytes or their number are not the index's, or a sample lies outside its shard.
    """

    def __init__(
        self, path: Path, record: Mapping[str, Any], shards: Mapping[str, int], file: int | None = None
    ) -> None:
        self.path, self.shards = path, dict(shards)
        self._open(file)
        self.starts, digest, misplaced = self._scan(record["bytes"])  # starts: int64 [samples + 1]
        if digest != record["sha256"]:
            raise WrongBytes(
                f"{path}: its bytes are not those that were written: they have sha256 {digest}, the index says "
                f"{record['sha256']}; copy it again, or run tools/prepare.py again with the same options to make "
                "it anew"
            )
        if misplaced:
            raise misplaced
        if len(self) != record["count"]:
            raise HdlError(f"{path}: has {len(self):,} samples, the index says {record['count']:,}")

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, i: int) -> SampleInfo: ...
    @overload
    def __getitem__(self, i: slice) -> list[SampleInfo]: ...
    def __getitem__(self, i: int | slice) -> SampleInfo | list[SampleInfo]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i = int(i) % len(self)
        return self._parsed(i, i + 1)[0]

    def __iter__(self) -> Iterator[SampleInfo]:
        for first in range(0, len(self), AT_ONCE):
            yield from self._parsed(first, min(first + AT_ONCE, len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open(None)

    def _open(self, file: int | None) -> None:
        try:
            self.file = os.open(self.path, os.O_RDONLY) if file is None else file
        except OSError as error:
            raise HdlError(f"{self.path}: the list of samples cannot be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self.file)

    def _parsed(self, first: int, end: int) -> list[SampleInfo]:
        bounds = self.starts[first : end + 1].tolist()
        data = os.pread(self.file, bounds[-1] - bounds[0], bounds[0])
        lines = [data[a - bounds[0] : b - bounds[0]] for a, b in pairwise(bounds)]
        return [self._info(i, line) for i, line in enumerate(lines, first)]

    def _info(self, i: int, line: bytes) -> SampleInfo:
        try:
            info = info_from_json(line.decode())
            self._check(i, info.shard, info.offset, info.size)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HdlError(
                f"{self.path}: line {i + 1} describes no sample ({type(error).__name__}: {error}); prepare the "
                "images again into a new folder"
            ) from None
        return info

    def _check(self, i: int, shard: str, offset: int, size: int) -> None:
        if shard not in self.shards:
            raise HdlError(f"{self.path}: line {i + 1} names shard {shard!r}, which the index does not list")
        if offset < 0 or size <= 0 or offset + size > self.shards[shard]:
            raise HdlError(
                f"{self.path}: line {i + 1} places a sample at {offset:,} + {size:,} bytes, outside of {shard} "
                f"with {self.shards[shard]:,}"
            )

    def _scan(self, size: int) -> tuple[np.ndarray, str, HdlError | None]:
        """Where the lines begin and the last one ends, the sha256 of it all, and what is wrong with a place."""
        digest, starts = hashlib.sha256(), [np.zeros(1, np.int64)]
        misplaced: HdlError | None = None
        size_of = {name.encode(): size for name, size in self.shards.items()}
        lines, at, rest = 0, 0, b""  # rest: the line that is not whole yet, which ends at byte `at`
        while data := os.pread(self.file, BLOCK, at):
            digest.update(data)
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
            starts.append(ends + at)
            at += len(data)
            if len(ends):
                text, begins = rest + data, [0, *(ends + len(rest)).tolist()]
                misplaced = misplaced or self._misplaced(lines, text, begins[:-1], size_of)
                lines, rest = lines + len(ends), text[begins[-1] :]
            else:
                rest += data
            if at > size or len(rest) > BLOCK:  # not the index's file, or none of lines: no need for the rest
                break
        if rest:
            starts.append(np.array([at]))
        return np.concatenate(starts), digest.hexdigest(), misplaced

    def _misplaced(
        self, first: int, text: bytes, begins: list[int], size_of: dict[bytes, int]
    ) -> HdlError | None:
        """Early and fast, before any training; a line that is written another way is checked when it is parsed."""
        places = [found.groups() for begin in begins if (found := PLACE.match(text, begin))]
        if len(places) < len(begins):
            return None
        names, offsets, sizes = zip(*places)
        lengths = np.array([size_of.get(name, -1) for name in names])
        starts, counts = (np.array(numbers, "S18").astype(np.int64) for numbers in (offsets, sizes))
        for i in np.flatnonzero((starts + counts > lengths) | (counts == 0)).tolist():
            try:
                self._check(first + i, names[i].decode(errors="replace"), int(offsets[i]), int(sizes[i]))
            except HdlError as error:
                return error
        return None
