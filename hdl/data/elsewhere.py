"""Prepared data that does not lie in a folder here: fetched shard by shard, kept in a bounded folder, read there."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdl.data.cache import Cache
from hdl.data.fetch import Fetcher, ShardLost
from hdl.data.index import INDEX_FILE, INDEX_LIMIT, parse_index, shard_bytes
from hdl.data.infos import Infos, WrongBytes
from hdl.data.prefetch import Ahead
from hdl.data.samples import SampleInfo
from hdl.data.storage import Source
from hdl.errors import HdlError

PROMPT_LIMIT = 64 * 2**20  # bytes


def default_cache() -> Path:
    return Path(os.environ.get("HDL_CACHE") or "~/.cache/hdl/shards").expanduser()


@dataclass(frozen=True)
class CacheOptions:
    """Of shards that lie elsewhere.

    folder: of the fetched shards, shared by all that name it; gib: what it may hold.
    storage: options for fsspec's file system, besides its own environment variables and files.
    stall: seconds without a byte after which a connection is given up; tries: of each file.
    """

    folder: Path = field(default_factory=default_cache)
    gib: float = 20.0
    storage: dict[str, Any] = field(default_factory=dict)
    stall: float = 30.0
    tries: int = 5


class Elsewhere:
    """Shards that come over a network or a pipe, by way of the cache."""

    def __init__(self, source: Source, options: CacheOptions) -> None:
        self.source, self.shown = source, source.shown()
        self.fetcher = Fetcher(source, options.stall, options.tries)
        self.cache = Cache(options.folder.expanduser(), int(options.gib * 2**30))
        self.lost: dict[str, str] = {}  # shard -> why
        self.most_ahead = 0  # bytes
        self.lists = 0  # bytes of the cache that its list of samples takes
        self.ahead = Ahead(self._have)

    @property
    def failures(self) -> list[str]:
        return self.fetcher.failures

    def index(self) -> dict[str, Any]:
        shown = self.source.shown(INDEX_FILE)
        return parse_index(self.fetcher.small(INDEX_FILE, INDEX_LIMIT), shown)

    def open(self, index: dict[str, Any]) -> Infos:
        samples, sizes = index["samples"], shard_bytes(index)
        largest, room = max(sizes.values()), self.cache.limit - samples["bytes"]
        if room < 2 * largest:
            raise HdlError(
                f"data.cache_gib {self.cache.limit / 2**30:.3g} is too small for {self.shown}: beside its list of "
                f"samples ({samples['bytes']:,} bytes) it must hold two shards of up to {largest:,}; set at least "
                f"{(samples['bytes'] + 2 * largest) / 2**30:.3g}, better room for some twenty shards"
            )
        self.most_ahead = room - largest  # which leaves room for one that is wanted now
        self.lists = samples["bytes"]
        self.records = {shard["file"]: shard for shard in index["shards"]}
        for attempt in range(2):
            file = self.cache.hold(samples, lambda part: self.fetcher.into(part, samples))
            try:
                return Infos(self.cache.path(samples), samples, sizes, file)
            except WrongBytes:  # it was right when it was fetched
                self.cache.drop(samples)
                if attempt:
                    raise
        raise AssertionError

    def prompt(self, record: dict[str, Any]) -> bytes:
        return self.fetcher.small(record["file"], PROMPT_LIMIT, record)

    def payload(self, record: dict[str, Any], info: SampleInfo) -> bytes:
        for _ in range(2):
            with self.cache.use(record, lambda part: self._fetch(part, record)) as file:
                payload = os.pread(file, info.size, info.offset)
            if hashlib.sha256(payload).hexdigest() == info.sha256:
                return payload
            self.cache.drop(record)  # the whole shard was right when it was fetched: fetch it again
        raise ShardLost(
            info.shard,
            f"{self.source.shown(info.shard)}: sample {info.key} (of {info.source}) is damaged: the shard is the "
            "one of the index, but the sample's bytes are not those that were written; prepare the images again",
        )

    def prefetch(self, records: list[dict[str, Any]]) -> None:
        fitting, total = [], 0
        for record in records:
            total += record["bytes"]
            if total > self.most_ahead:
                break
            fitting.append(record)
        for record in reversed(fitting):  # so that the first one is the last to go
            self.cache.touch(record)
        self.ahead.set([record["file"] for record in fitting if record["file"] not in self.lost])

    def _have(self, name: str) -> None:
        record = self.records[name]
        with suppress(HdlError), self.cache.use(record, lambda part: self._fetch(part, record)):
            pass

    def _fetch(self, part: int, record: dict[str, Any]) -> None:
        name = record["file"]
        if name not in self.lost:
            try:
                return self.fetcher.into(part, record)
            except HdlError as error:
                self.lost[name] = str(error)
        raise ShardLost(name, self.lost[name])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "ahead"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.ahead = Ahead(self._have)
