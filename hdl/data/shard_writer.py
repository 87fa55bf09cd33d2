"""Writing a prepared folder so that it can be stopped at any moment and taken up again.

Samples arrive one by one, in order, either made now (`add`) or known from an earlier run (`reuse`). A shard
is closed when the next sample would make it too large, then renamed to its final name and noted in
`unfinished.jsonl`; a run that takes over from a killed one reuses what is noted there. Bytes depend only on
the samples and their order, so adding to a folder gives the very files that starting afresh would.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import webdataset

from hdl.data.samples import SampleInfo, info_from_json, info_to_json
from hdl.data.shards import (
    FORMAT,
    INDEX_FILE,
    VERSION,
    bucket_counts,
    dataset_hash,
    read_checked,
    read_payload,
    write_durably,
)
from hdl.errors import HdlError
from hdl.o1.patches import PATCH

SHARD_BYTES = 256 * 2**20  # some 80 samples of 1024² px; at most so much is lost when a run is killed
UNFINISHED_FILE = "unfinished.jsonl"
GENERATED = re.compile(
    r"shard-\d{6}-[0-9a-f]{8}\.tar|samples-[0-9a-f]{8}\.jsonl|empty-[0-9a-f]{8}\.safetensors"
)
OWN = re.compile(
    rf"({GENERATED.pattern}|shard-\d{{6}}|index\.json|unfinished\.jsonl|report\.(txt|json))(\.tmp)?"
)


@dataclass
class Earlier:
    """What earlier runs left that can be taken over."""

    shards: dict[str, dict[str, Any]]  # file name -> its record in the index
    samples: dict[str, list[SampleInfo]]  # file name -> its samples in order
    finished_sources: set[str]  # images that the last finished run has samples of

    def by_recipe(self) -> dict[tuple[str, str], SampleInfo]:
        """(source, recipe) -> sample; an unfinished run may have made one of a source with another recipe."""
        return {(info.source, info.recipe): info for infos in self.samples.values() for info in infos}


def read_earlier(folder: Path, index: dict[str, Any] | None) -> Earlier:
    """Samples of the finished run (its index, if any) and of an unfinished one, in shards that are whole."""
    earlier = Earlier({}, {}, set())
    if index:
        try:
            lines = read_checked(folder, index["samples"]).decode().splitlines()
        except HdlError:  # without its list nothing of the finished run can be taken over: make it all anew
            lines, index = [], index | {"shards": []}
        infos = [info_from_json(line) for line in lines]
        earlier.finished_sources = {info.source for info in infos}
        for record in index["shards"]:
            earlier.shards[record["file"]] = record
            earlier.samples[record["file"]] = []
        for info in infos:
            earlier.samples[info.shard].append(info)
    for note in _unfinished(folder):
        earlier.shards[note["shard"]["file"]] = note["shard"]
        earlier.samples[note["shard"]["file"]] = [
            info_from_json(json.dumps(info)) for info in note["samples"]
        ]
    for name, record in list(earlier.shards.items()):
        path = folder / name
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            del earlier.shards[name], earlier.samples[name]
    return earlier


class ShardWriter:
    """Writes shards into `folder`; `finish` makes them the folder's content.

    Until then an earlier generation in the same folder stays whole and valid.
    """

    def __init__(self, folder: Path, earlier: Earlier, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.earlier = earlier
        self.shard_bytes = shard_bytes
        self.infos: list[SampleInfo] = []  # of closed shards
        self.shards: list[dict[str, Any]] = []  # closed
        self.current: list[SampleInfo] = []  # of the open shard
        self.current_bytes = 0
        # Opened with the first sample that is not simply the next one of an earlier shard: a shard that
        # turns out to be the same as before is never copied.
        self.file: IO[bytes] | None = None
        self.tar: webdataset.TarWriter | None = None

    def add(self, info: SampleInfo, payload: bytes) -> None:
        """A sample made in this run; its shard and offset are filled in here."""
        self._make_room(info)
        self._open()
        self._write(info, payload)
        self.current.append(info)

    def reuse(self, info: SampleInfo) -> None:
        """A sample of an earlier shard in this folder."""
        self._make_room(info)
        if self.tar is not None:
            self._write(info, read_payload(self.folder, info))
        self.current.append(info)

    def finish(self, base: dict[str, Any], options: dict[str, Any], empty: bytes, empty_tokens: int) -> None:
        """Close the last shard, write the index, and remove what only earlier generations used."""
        self._close()
        lines = "".join(info_to_json(info) + "\n" for info in self.infos).encode()
        samples = self._store("samples", ".jsonl", lines) | {"count": len(self.infos)}
        empty_prompt = self._store("empty", ".safetensors", empty) | {"text_tokens": empty_tokens}
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dataset_hash": dataset_hash(base["fingerprint"], samples, empty_prompt),
            "base": base,
            "options": options,
            "buckets": [
                {"rows": rows, "cols": cols, "height": rows * PATCH, "width": cols * PATCH, "samples": count}
                for (rows, cols), count in bucket_counts(self.infos).items()
            ],
            "samples": samples,
            "empty_prompt": empty_prompt,
            "shards": self.shards,
        }
        write_durably(self.folder / INDEX_FILE, json.dumps(index, indent=1).encode())
        self._remove_all_but(
            {samples["file"], empty_prompt["file"], *(shard["file"] for shard in self.shards)}
        )

    def abandon(self) -> None:
        """Give up the open shard; closed ones stay noted for the next run."""
        if self.file is not None and self.tar is not None:
            with suppress(OSError):  # a full disk is already being reported
                self.tar.close()
                self.file.close()
            os.unlink(self.file.name)
            self.file = self.tar = None

    def _make_room(self, info: SampleInfo) -> None:
        needed = _tar_bytes(info.size) + _tar_bytes(len(_description(info)))
        if self.current and self.current_bytes + needed > self.shard_bytes:
            self._close()
        self.current_bytes += needed

    def _open(self) -> None:
        if self.tar is None:
            self.file = open(self.folder / f"shard-{len(self.shards):06d}.tmp", "wb")  # noqa: SIM115  # closed by _close_file or abandon
            self.tar = webdataset.TarWriter(self.file, encoder=False, mtime=0)
            for info in self.current:
                self._write(info, read_payload(self.folder, info))

    def _write(self, info: SampleInfo, payload: bytes) -> None:
        assert self.tar is not None
        self.tar.write({"__key__": info.key, "json": _description(info), "safetensors": payload})

    def _close(self) -> None:
        if not self.current:
            return
        if self.tar is None and self._same_as_before():
            name = self.current[0].shard
            record, infos = self.earlier.shards[name], self.current
        else:
            self._open()
            record, infos = self._close_file()
        self.shards.append(record)
        self.infos += infos
        self.current, self.current_bytes = [], 0

    def _same_as_before(self) -> bool:
        name = self.current[0].shard
        return (
            name.startswith(f"shard-{len(self.shards):06d}-") and self.earlier.samples[name] == self.current
        )

    def _close_file(self) -> tuple[dict[str, Any], list[SampleInfo]]:
        assert self.file is not None and self.tar is not None
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = Path(self.file.name)
        self.file = self.tar = None
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        name = f"{path.stem}-{digest[:8]}.tar"
        infos = [replace(i, shard=name, offset=offsets[f"{i.key}.safetensors"]) for i in self.current]
        record = {"file": name, "bytes": path.stat().st_size, "sha256": digest, "samples": len(infos)}
        os.replace(path, self.folder / name)
        with open(self.folder / UNFINISHED_FILE, "a", encoding="utf-8") as notes:
            note = {"version": VERSION, "shard": record, "samples": [asdict(info) for info in infos]}
            notes.write(json.dumps(note) + "\n")
        return record, infos

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


def _unfinished(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / UNFINISHED_FILE
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                note = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run was killed
                continue
            if note["version"] == VERSION:
                yield note


def _description(info: SampleInfo) -> bytes:
    """KEY.json, for readers other than hdl."""
    names = (
        "captions",
        "references",
        "source",
        "view",
        "style",
        "tags",
        "caption_sha256",
        "embeds_sha256",
        "image_sha256",
    )
    described = {name: getattr(info, name) for name in names}
    return json.dumps(described | {"height": info.rows * PATCH, "width": info.cols * PATCH}).encode()


def _tar_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: its header and its data in blocks of 512."""
    return 512 + -(-size // 512) * 512
