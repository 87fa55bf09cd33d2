"""Writing a prepared folder so that it can be stopped at any moment and taken up again.

Samples arrive one by one, in order, either made now (`add`) or known from an earlier run (`reuse`). A shard
is closed when the next sample would make it too large, then renamed to its final name and noted in
`unfinished.jsonl`; a run that takes over from a killed one reuses what is noted there. Bytes depend only on
the samples and their order, so adding to a folder gives the very files that starting afresh would.

Unusual: the tar is put together here, as webdataset's own writer does it but without its detours, because then
a sample's offset is known as it is written and the shard need not be read again. The list of samples grows on
disk; memory holds only the lines of the open shard.
"""

import hashlib
import json
import os
import re
import tarfile
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from hdl.data.earlier import UNFINISHED_FILE, Earlier, Known, short_hash
from hdl.data.index import FORMAT, INDEX_FILE, VERSION
from hdl.data.samples import SampleInfo, info_to_json
from hdl.data.shards import dataset_hash, read_payload, write_durably
from hdl.o1.patches import PATCH

SHARD_BYTES = 256 * 2**20  # some 80 samples of 1024² px; at most so much is lost when a run is killed
LOCK_FILE = "prepare.lock"
GENERATED = re.compile(
    r"shard-\d{6}-[0-9a-f]{8}\.tar|samples-[0-9a-f]{8}\.jsonl|empty-[0-9a-f]{8}\.safetensors"
)
OWN = re.compile(
    rf"({GENERATED.pattern}|shard-\d{{6}}|samples|index\.json|unfinished\.jsonl|report\.(txt|json|html))(\.tmp)?"
    rf"|{re.escape(LOCK_FILE)}"
)
BLOCK = 512  # of a tar
FILE_BUFFER = 2**20  # bytes: small samples are then written many at a time


class ShardWriter:
    """Writes shards into `folder`; `finish` makes them the folder's content.

    Until then an earlier generation in the same folder stays whole and valid.
    """

    def __init__(self, folder: Path, earlier: Earlier, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.earlier = earlier
        self.shard_bytes = shard_bytes
        self.shards: list[dict[str, Any]] = []  # closed
        self.grids: Counter[tuple[int, int]] = Counter()  # of samples in closed shards
        self.samples = _HashedFile(folder / "samples.tmp")  # lines of samples in closed shards
        self.sources = array("Q")  # hashes of the images taken, each once
        self.last_source: str | None = None
        self.current: list[Known] = []  # of the open shard
        self.offsets: list[int] = []  # of those of them that are written already: all or none
        self.current_bytes = 0
        # Opened with the first sample that is not simply the next one of an earlier shard: a shard that
        # turns out to be the same as before is never copied.
        self.tar: _HashedFile | None = None

    def add(self, info: SampleInfo, payload: bytes) -> None:
        """A sample made in this run; its shard and offset are filled in here."""
        described = _description(info)
        self._make_room(info, described)
        self._open()
        self.offsets.append(self._write(info, described, payload))
        self.current.append(Known(info, b""))

    def reuse(self, known: Known) -> None:
        """A sample of an earlier shard in this folder."""
        described = _description(known.info)
        self._make_room(known.info, described)
        if self.tar is not None:
            self.offsets.append(self._write(known.info, described, read_payload(self.folder, known.info)))
        self.current.append(known)

    def removed(self) -> int:
        """How many images the last finished run had samples of and this one has not."""
        return len(np.setdiff1d(self.earlier.finished, np.frombuffer(self.sources, np.uint64)))

    def finish(self, base: dict[str, Any], options: dict[str, Any], empty: bytes, empty_tokens: int) -> None:
        """Close the last shard, write the index, and remove what only earlier generations used."""
        self._close()
        count = sum(self.grids.values())
        name = f"samples-{self.samples.digest()[:8]}.jsonl"
        samples = self.samples.keep_as(self.folder / name) | {"count": count}
        empty_prompt = self._store("empty", ".safetensors", empty) | {"text_tokens": empty_tokens}
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dataset_hash": dataset_hash(base["fingerprint"], samples, empty_prompt),
            "base": base,
            "options": options,
            "buckets": [
                {"rows": rows, "cols": cols, "height": rows * PATCH, "width": cols * PATCH, "samples": count}
                for (rows, cols), count in self.buckets().items()
            ],
            "samples": samples,
            "empty_prompt": empty_prompt,
            "shards": self.shards,
        }
        write_durably(self.folder / INDEX_FILE, json.dumps(index, indent=1).encode())
        self._remove_all_but(
            {samples["file"], empty_prompt["file"], *(shard["file"] for shard in self.shards)}
        )

    def buckets(self) -> dict[tuple[int, int], int]:
        """(rows, cols) -> number of samples, the fullest bucket first."""
        return dict(sorted(self.grids.items(), key=lambda item: (-item[1], item[0])))

    def abandon(self) -> None:
        """Give up the open shard; closed ones stay noted for the next run."""
        for file in (self.tar, self.samples):
            if file is not None:
                file.remove()
        self.tar = None

    def _make_room(self, info: SampleInfo, described: bytes) -> None:
        needed = _tar_bytes(info.size) + _tar_bytes(len(described))
        if self.current and self.current_bytes + needed > self.shard_bytes:
            self._close()
        self.current_bytes += needed
        if info.source != self.last_source:
            self.sources.append(short_hash(info.source))
            self.last_source = info.source

    def _open(self) -> None:
        if self.tar is None:
            self.tar = _HashedFile(self.folder / f"shard-{len(self.shards):06d}.tmp")
            for known in self.current:
                payload = read_payload(self.folder, known.info)
                self.offsets.append(self._write(known.info, _description(known.info), payload))

    def _write(self, info: SampleInfo, described: bytes, payload: bytes) -> int:
        """The payload's offset in the open shard."""
        assert self.tar is not None
        head = _member(f"{info.key}.json", described) + _header(f"{info.key}.safetensors", len(payload))
        self.tar.write(head)
        self.tar.write(payload)
        self.tar.write(bytes(-len(payload) % BLOCK))
        return self.tar.size - _tar_bytes(len(payload)) + BLOCK

    def _close(self) -> None:
        if not self.current:
            return
        if self.tar is None and self._same_as_before():
            name = self.current[0].info.shard
            record, lines = self.earlier.shards[name], self.earlier.lines_of(name)
        else:
            self._open()
            record, lines = self._close_file()
        self.shards.append(record)
        self.samples.write(lines)
        self.grids.update((known.info.rows, known.info.cols) for known in self.current)
        self.current, self.offsets, self.current_bytes = [], [], 0

    def _same_as_before(self) -> bool:
        name = self.current[0].info.shard
        if not name.startswith(f"shard-{len(self.shards):06d}-"):
            return False
        return self.earlier.lines_of(name) == b"".join(known.line + b"\n" for known in self.current)

    def _close_file(self) -> tuple[dict[str, Any], bytes]:
        """Record of the shard now closed, and its samples' lines."""
        assert self.tar is not None
        end = self.tar.size + 2 * BLOCK
        self.tar.write(bytes(end - self.tar.size + -end % tarfile.RECORDSIZE))
        name = f"shard-{len(self.shards):06d}-{self.tar.digest()[:8]}.tar"
        record = self.tar.keep_as(self.folder / name) | {"samples": len(self.current)}
        self.tar = None
        placed = zip(self.current, self.offsets)
        lines = "".join(
            info_to_json(known.info, shard=name, offset=offset) + "\n" for known, offset in placed
        ).encode()
        with open(self.folder / UNFINISHED_FILE, "ab") as notes:
            # What a killed run left may end within a line.
            notes.write(b"\n" + lines + json.dumps({"version": VERSION, "shard": record}).encode() + b"\n")
        return record, lines

    def _store(self, stem: str, suffix: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        name = f"{stem}-{digest[:8]}{suffix}"
        write_durably(self.folder / name, data)
        return {"file": name, "bytes": len(data), "sha256": digest}

    def _remove_all_but(self, kept: set[str]) -> None:
        for path in self.folder.iterdir():
            stale = GENERATED.fullmatch(path.name) and path.name not in kept
            if stale or path.name == UNFINISHED_FILE or (path.suffix == ".tmp" and OWN.fullmatch(path.name)):
                path.unlink()


class _HashedFile:
    """A temporary file whose size and hash are known while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        if self._file is None:
            self._file = open(self.path, "wb", FILE_BUFFER)  # noqa: SIM115  # closed by keep_as or remove
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def keep_as(self, path: Path) -> dict[str, Any]:
        """Give it its final name; its record in the index."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.path, path)
        self._file = None
        return {"file": path.name, "bytes": self.size, "sha256": self.digest()}

    def remove(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk is already being reported
                self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)


def _description(info: SampleInfo) -> bytes:
    """KEY.json, for readers other than hdl."""
    described = {
        "captions": info.captions,
        "references": info.references,
        "source": info.source,
        "view": info.view,
        "style": info.style,
        "tags": info.tags,
        "caption_sha256": info.caption_sha256,
        "embeds_sha256": info.embeds_sha256,
        "image_sha256": info.image_sha256,
        "height": info.rows * PATCH,
        "width": info.cols * PATCH,
    }
    return json.dumps(described).encode()


def _tar_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: its header and its data in blocks of 512."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def _header(name: str, size: int) -> bytes:
    """A tar header as webdataset writes it. Names are ASCII and shorter than 100 (`key_of`): one block."""
    file, digits = name.encode(), b"%011o" % size
    block = bytearray(_EMPTY)
    block[: len(file)] = file
    block[124:135] = digits
    block[148:156] = b"%06o\0 " % (_EMPTY_SUM + sum(file) + sum(digits))
    return bytes(block)


def _empty_header() -> bytes:
    member = tarfile.TarInfo("")
    member.mode, member.uname, member.gname = 0o444, "bigdata", "bigdata"
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:135] = bytes(11)
    block[148:156] = bytes(8)
    return bytes(block)


_EMPTY = _empty_header()
_EMPTY_SUM = sum(_EMPTY) + 8 * ord(" ")  # of all bytes, as if those of the sum itself were spaces
