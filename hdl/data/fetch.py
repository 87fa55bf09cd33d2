"""Fetching files from a source that fails at times: tried again, checked as they stream in, and given up.

A shard that was given up is lost: what is wanted of it raises `ShardLost` from then on, so that a run can go
on without it. Bytes whose hash is not the index's are never handed on: at most they lie under a name that
nobody reads, until they are overwritten or removed.

A try goes on where the one before broke off, if the source can give parts of files. What holds the parts together is
the hash of the whole: where it is wrong in the end, the next try begins anew.
"""

import hashlib
import os
import random
from collections.abc import Callable
from contextlib import closing
from time import sleep
from typing import Any, TypeVar

from hdl.data.storage import Failure, Source, chunks
from hdl.errors import HdlError

# Seconds before trying again, five times as long each time: most failures are over at once, an outage is not.
FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0

T = TypeVar("T")


class ShardLost(HdlError):
    """What was wanted of a shard cannot be had. shard: its file name."""

    def __init__(self, shard: str, message: str) -> None:
        super().__init__(message)
        self.shard = shard


class Came:
    """What has come of a file: so many bytes from its start, with this hash."""

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        self.digest, self.count = hashlib.sha256(), 0


class Fetcher:
    """stall: seconds without a byte after which a connection is given up. tries: of each file.

    failures: a line for every try that failed, those that a later one made good included, and for every silence that
    a second connection was opened in.
    """

    def __init__(self, source: Source, stall: float, tries: int) -> None:
        self.source, self.stall, self.tries = source, stall, tries
        self.failures: list[str] = []

    def small(self, name: str, limit: int, record: dict[str, Any] | None = None) -> bytes:
        """A file's bytes, those that its record in the index asks for; HdlError where they cannot be had."""

        def receive() -> bytes:
            data = bytearray()
            self._stream(name, record, limit, Came(), lambda part, at: data.extend(part))
            return bytes(data)

        return self._tried(name, receive)

    def into(self, file: int, record: dict[str, Any]) -> None:
        """Write a file of the index into an open one, from its start; HdlError where it cannot be had."""
        name, came = record["file"], Came()
        self._tried(
            name,
            lambda: self._stream(
                name, record, record["bytes"], came, lambda part, at: _write(file, part, at)
            ),
        )

    def _stream(
        self,
        name: str,
        record: dict[str, Any] | None,
        limit: int,
        came: "Came",
        put: Callable[[bytes, int], None],
    ) -> None:
        """came: by the tries before, and by this one when it fails."""
        with closing(chunks(self.source, name, self.stall, came.count, self._note(name))) as parts:
            for at, part in parts:
                if at != came.count:  # only the whole file can be had
                    came.start_over()
                if came.count + len(part) > limit:
                    came.start_over()
                    raise Failure(f"it is longer than {limit:,} bytes", final=record is None)
                came.digest.update(part)
                put(part, came.count)
                came.count += len(part)
        if record is not None and came.count != record["bytes"]:
            raise Failure(f"it ended after {came.count:,} of {record['bytes']:,} bytes")
        found = came.digest.hexdigest()
        if record is not None and found != record["sha256"]:
            came.start_over()
            raise Failure(
                f"its bytes are not those that were written: they have sha256 {found}, the index says "
                f"{record['sha256']}"
            )

    def _note(self, name: str) -> Callable[[str], None]:
        return lambda text: self.failures.append(f"{name}: {text}")

    def _tried(self, name: str, attempt: Callable[[], T]) -> T:
        for tried in range(1, self.tries + 1):
            try:
                return attempt()
            except Failure as failure:
                self.failures.append(f"{name}: {failure}")
                if failure.final or tried == self.tries:
                    times = "" if tried == 1 else f" in {tried} tries, the last time because"
                    raise HdlError(
                        f"{self.source.shown(name)}: cannot be read{times}: {failure}"
                    ) from failure
                longest = min(FIRST_WAIT * 5 ** (tried - 1), LONGEST_WAIT)
                sleep(longest * random.uniform(0.5, 1))  # so that ranks do not all ask at once
        raise AssertionError("tries is at least 1")


def _write(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
