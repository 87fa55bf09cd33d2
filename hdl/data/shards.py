"""Prepared data, and reading it from wherever it lies.

A folder of WebDataset tar shards (any WebDataset reader can iterate them) plus an index that lets any
sample be read by itself:

    index.json                     what this is, for which base; name, size and hash of every other file
    shard-000000-1a2b3c4d.tar      per sample KEY.safetensors (see hdl/data/samples.py) and KEY.json
    samples-1a2b3c4d.jsonl         one `SampleInfo` a line, in training order
    empty-1a2b3c4d.safetensors     the empty prompt, for caption dropout
    report.txt, report.json        what was skipped and why

A folder here is read in place. Of one elsewhere (hdl/data/storage.py) a shard is fetched whole when it is first
needed, checked, kept in a bounded folder here (hdl/data/cache.py) and read there.

Unusual: names carry the start of the content's hash. A new generation of files can then lie beside the old
one, and the change from one to the other is the single atomic replacement of index.json.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdl.data.elsewhere import CacheOptions, Elsewhere
from hdl.data.fetch import ShardLost
from hdl.data.index import INDEX_FILE, INDEX_LIMIT, PREPARE_AGAIN, parse_index, shard_bytes
from hdl.data.infos import Infos
from hdl.data.samples import Sample, SampleInfo, prompt_from, sample_from
from hdl.data.storage import folder_of, source_of
from hdl.errors import HdlError


class Shards:
    """Prepared data, checked on opening. May be pickled and forked freely, and read from several threads.

    location: the folder that tools/prepare.py wrote, or where it was copied: a path, a URL that fsspec opens, or
    "pipe:COMMAND with {file}". fingerprint: of the base to train, or None to take any.
    infos: the samples' `SampleInfo`s, parsed when asked for; empty: the empty prompt; dataset_hash: identifies
    the data, their order included. failures: a line for every fetch that failed, also those made good by
    another try.
    Raises HdlError where there is no index, the format is another, a file is missing or of the wrong size,
    the text embeddings belong to another base, or the cache has no room for two shards. Elsewhere the shards
    themselves are looked at only when they are fetched.
    """

    def __init__(
        self, location: str | Path, fingerprint: str | None = None, cache: CacheOptions | None = None
    ) -> None:
        options = cache or CacheOptions()
        source = source_of(location, options.storage)
        self.home: Folder | Elsewhere = Elsewhere(source, options) if source else Folder(folder_of(location))
        self.index = self.home.index()
        check_base(self.home.shown, self.index, fingerprint)
        self.records = {shard["file"]: shard for shard in self.index["shards"]}
        self.infos = self.home.open(self.index)
        self.empty = prompt_from(self.home.prompt(self.index["empty_prompt"]))
        self.dataset_hash: str = self.index["dataset_hash"]

    def __len__(self) -> int:
        return len(self.infos)

    @property
    def failures(self) -> list[str]:
        return self.home.failures

    def read(self, i: int, caption: int = 0) -> Sample:
        """Sample i with one of its captions. ShardLost naming shard and key where its bytes are not those that
        were written or its shard cannot be had."""
        info = self.infos[i]
        return sample_from(self.home.payload(self.records[info.shard], info), info, caption)

    def prefetch(self, names: Sequence[str]) -> None:
        """These shards are wanted next, in this order, instead of those named before; returns at once.

        A few are fetched at once, as many of the first ones as the cache holds. What goes wrong is told by `read`.
        """
        self.home.prefetch([self.records[name] for name in names])


class Folder:
    """Shards in a folder here, read in place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shown = folder, str(folder)
        self.failures: list[str] = []

    def index(self) -> dict[str, Any]:
        return read_index(self.folder)

    def open(self, index: dict[str, Any]) -> Infos:
        for shard in index["shards"]:
            check_size(self.folder / shard["file"], shard["bytes"])
        path = self.folder / index["samples"]["file"]
        check_size(path, index["samples"]["bytes"])
        return Infos(path, index["samples"], shard_bytes(index))

    def prompt(self, record: dict[str, Any]) -> bytes:
        return read_checked(self.folder, record)

    def payload(self, record: dict[str, Any], info: SampleInfo) -> bytes:
        return read_payload(self.folder, info)

    def prefetch(self, records: list[dict[str, Any]]) -> None:
        """Nothing to do: they are here."""


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a prepared folder; HdlError where there is none or it is not this format."""
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise HdlError(f"{folder}: no such folder; expected one made by tools/prepare.py")
    if not path.is_file():
        raise HdlError(f"{folder}: no {INDEX_FILE} there; expected a folder that tools/prepare.py finished")
    if path.stat().st_size > INDEX_LIMIT:
        raise HdlError(f"{path}: larger than {INDEX_LIMIT:,} bytes: not an index of hdl shards")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HdlError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_index(data, str(path))


def check_base(folder: Path | str, index: dict[str, Any], fingerprint: str | None) -> None:
    """HdlError where the shards' text embeddings come from another base."""
    found = index["base"]["fingerprint"]
    if fingerprint is not None and fingerprint != found:
        raise HdlError(
            f"{folder}: shards of another base: its text embeddings come from token table {found[:23]}…, "
            f"the checkpoint given has {fingerprint[:23]}…; name the checkpoint they were prepared with, or "
            "prepare the images for this one into a new folder"
        )


def check_size(path: Path, size: int) -> None:
    """HdlError where a file of the index is missing or not as long as it was written."""
    if not path.is_file():
        raise HdlError(f"{path}: missing, but {INDEX_FILE} lists it; copy it again or {PREPARE_AGAIN}")
    found = path.stat().st_size
    if found != size:
        raise HdlError(
            f"{path}: has {found:,} bytes, {INDEX_FILE} says {size:,}: it is "
            f"{'cut off' if found < size else 'not the file that was written'}; "
            f"copy it again or {PREPARE_AGAIN}"
        )


def read_checked(folder: Path, record: dict[str, Any]) -> bytes:
    """The bytes of a file by its record in the index (file, bytes, sha256)."""
    path = folder / record["file"]
    check_size(path, record["bytes"])
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise HdlError(f"{path}: its bytes are not those that were written; copy it again or {PREPARE_AGAIN}")
    return data


def read_payload(folder: Path, info: SampleInfo) -> bytes:
    """The safetensors bytes of a sample, checked against its hash; ShardLost where they are others."""
    path = folder / info.shard
    try:
        with open(path, "rb") as file:
            file.seek(info.offset)
            payload = file.read(info.size)
    except OSError as error:
        raise ShardLost(
            info.shard, f"{path}: cannot be read ({error.strerror}); sample {info.key} was wanted"
        ) from None
    if hashlib.sha256(payload).hexdigest() != info.sha256:
        raise ShardLost(
            info.shard,
            f"{path}: sample {info.key} (of {info.source}) is damaged: its bytes are not those that were "
            f"written; copy the shard again, or delete it and {PREPARE_AGAIN}",
        )
    return payload


def dataset_hash(fingerprint: str, samples: dict[str, Any], empty: dict[str, Any]) -> str:
    """Identifies prepared data: their base, every sample and its place, and the empty prompt."""
    return hashlib.sha256(" ".join((fingerprint, samples["sha256"], empty["sha256"])).encode()).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """A file that appears under its name complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
