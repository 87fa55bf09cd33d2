"""Prepared data on disk, and reading it.

A folder of WebDataset tar shards (any WebDataset reader can iterate them) plus an index that lets any
sample be read by itself:

    index.json                     what this is, for which base; name, size and hash of every other file
    shard-000000-1a2b3c4d.tar      per sample KEY.safetensors (see hdl/data/samples.py) and KEY.json
    samples-1a2b3c4d.jsonl         one `SampleInfo` a line, in training order
    empty-1a2b3c4d.safetensors     the empty prompt, for caption dropout
    report.txt, report.json        what was skipped and why

Unusual: names carry the start of the content's hash. A new generation of files can then lie beside the old
one, and the change from one to the other is the single atomic replacement of index.json.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from hdl.data.samples import Sample, SampleInfo, info_from_json, prompt_from, sample_from
from hdl.errors import HdlError

FORMAT = "hdl-shards"
VERSION = 2
INDEX_FILE = "index.json"
PREPARE_AGAIN = "run tools/prepare.py again with the same options to make it anew"


class Shards:
    """A prepared folder, checked on opening. Holds no open file, so it may be pickled and forked freely.

    folder: what tools/prepare.py wrote. fingerprint: of the base to train, or None to take any.
    infos: list[SampleInfo]; empty: the empty prompt; dataset_hash: identifies the data, their order included.
    Raises HdlError where there is no index, the format is another, a file is missing or of the wrong size,
    or the text embeddings belong to another base.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        check_base(self.folder, self.index, fingerprint)
        for shard in self.index["shards"]:
            check_size(self.folder / shard["file"], shard["bytes"])
        lines = read_checked(self.folder, self.index["samples"])
        self.infos = [info_from_json(line) for line in lines.decode().splitlines()]
        self.empty = prompt_from(read_checked(self.folder, self.index["empty_prompt"]))
        self.dataset_hash: str = self.index["dataset_hash"]

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, i: int, caption: int = 0) -> Sample:
        """Sample i with one of its captions. HdlError naming shard and key where its bytes are not those that
        were written."""
        info = self.infos[i]
        return sample_from(read_payload(self.folder, info), info, caption)


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a prepared folder; HdlError where there is none or it is not this format."""
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise HdlError(f"{folder}: no such folder; expected one made by tools/prepare.py")
    if not path.is_file():
        raise HdlError(f"{folder}: no {INDEX_FILE} there; expected a folder that tools/prepare.py finished")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HdlError(
            f"{path}: not readable as JSON ({error}); {PREPARE_AGAIN} in an empty folder"
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise HdlError(f"{path}: not an index of hdl shards; expected a folder made by tools/prepare.py")
    if index.get("version") != VERSION:
        raise HdlError(
            f"{path}: shards of format version {index.get('version')}, this hdl reads version {VERSION}; "
            "prepare the images again into a new folder"
        )
    return index


def check_base(folder: Path, index: dict[str, Any], fingerprint: str | None) -> None:
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
    """The safetensors bytes of a sample, checked against its hash."""
    path = folder / info.shard
    try:
        with open(path, "rb") as file:
            file.seek(info.offset)
            payload = file.read(info.size)
    except OSError as error:
        raise HdlError(f"{path}: cannot be read ({error.strerror}); sample {info.key} was wanted") from None
    if hashlib.sha256(payload).hexdigest() != info.sha256:
        raise HdlError(
            f"{path}: sample {info.key} (of {info.source}) is damaged: its bytes are not those that were "
            f"written; copy the shard again, or delete it and {PREPARE_AGAIN}"
        )
    return payload


def dataset_hash(fingerprint: str, samples: dict[str, Any], empty: dict[str, Any]) -> str:
    """Identifies prepared data: their base, every sample and its place, and the empty prompt."""
    return hashlib.sha256(" ".join((fingerprint, samples["sha256"], empty["sha256"])).encode()).hexdigest()


def bucket_counts(infos: list[SampleInfo]) -> dict[tuple[int, int], int]:
    """(rows, cols) -> number of samples, the fullest bucket first."""
    counts = Counter((info.rows, info.cols) for info in infos)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write_durably(path: Path, data: bytes) -> None:
    """A file that appears under its name complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
