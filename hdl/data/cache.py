"""A folder of whole files from elsewhere, bounded in bytes and shared by every process that names it.

Files are named by their sha256, so that runs on different data can share one. The one used longest ago goes
first. Nothing but the files themselves is kept: what is whole, being fetched or in use is told by names and locks.

    SHA256.tar          whole. Who reads it holds a shared lock on it; who removes it, an exclusive one
    SHA256.tar.part     being fetched by whoever holds its exclusive lock, at its full length from the start; without
                        a lock it was left by a process that was killed. Renamed when its hash is right
    lock                held while files are counted, removed, given their length or renamed

Unusual: the locks are flock's, which end with the process that holds them however it ends; there is nothing to
clean up and nothing stale to wait for. The folder should be on a disk of the machine, where flock is certain.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdl.errors import HdlError

OURS = re.compile(r"[0-9a-f]{64}\.\w+(\.part)?")
LOCK_FILE = "lock"
PATIENCE = 10.0  # seconds to wait for room that nobody's fetch is about to give back
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Entry:
    path: Path
    bytes: int
    used: int  # ns; when last

    @property
    def unfinished(self) -> bool:
        return self.path.suffix == ".part"


class Cache:
    """folder: made if need be. limit: bytes that its files may take. HdlError where it cannot be written."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._make_room(0)
        except OSError as error:
            raise HdlError(
                f"{folder}: cannot be used as a cache ({error.strerror}); set data.cache to a folder that can be "
                "written"
            ) from None

    @contextmanager
    def use(self, record: dict[str, Any], fetch: Callable[[int], None]) -> Iterator[int]:
        """A file of the index (file, bytes, sha256), open and safe from removal; `fetch` writes it into an
        open file where it is not here yet. What fetch raises is raised, and nothing is kept then."""
        file = self.hold(record, fetch)
        try:
            yield file
        finally:
            os.close(file)

    def hold(self, record: dict[str, Any], fetch: Callable[[int], None]) -> int:
        """The same, until the caller closes it."""
        while (file := self._whole(record)) is None:
            self._fill(record, fetch)
        return file

    def touch(self, record: dict[str, Any]) -> None:
        """It will be used soon: let others go first."""
        with suppress(FileNotFoundError, PermissionError):
            os.utime(self.path(record))

    def drop(self, record: dict[str, Any]) -> None:
        """Its bytes have changed since: do not give it to anyone again."""
        self.path(record).unlink(missing_ok=True)

    def path(self, record: dict[str, Any]) -> Path:
        """Where it lies, if it is here."""
        return self.folder / (record["sha256"] + Path(record["file"]).suffix)

    def _whole(self, record: dict[str, Any]) -> int | None:
        try:
            file = os.open(self.path(record), os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file)
        if found.st_nlink and found.st_size == record["bytes"]:
            with suppress(PermissionError):  # another user's, in a folder that several share
                os.utime(file)
            return file
        if found.st_nlink:
            self.drop(record)
        os.close(file)
        return None

    def _fill(self, record: dict[str, Any], fetch: Callable[[int], None]) -> None:
        path = self.path(record)
        part = path.with_name(path.name + ".part")
        file = locked(part)
        try:
            if path.exists():  # another process was quicker
                part.unlink(missing_ok=True)
                return
            try:
                os.truncate(file, 0)
                self._reserve(file, record)
                fetch(file)
                with self._alone():  # or one who counts might see both names, or none
                    os.rename(part, path)
            except BaseException as error:
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in FULL:
                    raise self._full(record) from None
                raise
        finally:
            os.close(file)

    def _reserve(self, file: int, record: dict[str, Any]) -> None:
        """Give the file its length, and so its place in the bound and on the disk."""
        waiting_since = time.monotonic()
        while True:
            with self._alone():
                if self._make_room(record["bytes"]):
                    return self._allocate(file, record)
                held = self._entries()
            if any(entry.unfinished and entry.bytes for entry in held):  # will be done, and can go then
                waiting_since = time.monotonic()
            if time.monotonic() - waiting_since > PATIENCE:
                raise HdlError(
                    f"{self.folder}: no room for {record['file']} ({record['bytes']:,} bytes): "
                    f"{sum(entry.bytes for entry in held):,} of {self.limit:,} bytes are files in use, by other "
                    "runs too; raise data.cache_gib or give this run a data.cache of its own"
                )
            time.sleep(0.05)

    def _allocate(self, file: int, record: dict[str, Any]) -> None:
        while True:
            try:
                return os.posix_fallocate(file, 0, record["bytes"])
            except OSError as error:
                if error.errno not in FULL:  # a file system that cannot: writing will show
                    return os.truncate(file, record["bytes"])
                if not any(_removed(entry) for entry in self._entries() if not entry.unfinished):
                    raise

    def _full(self, record: dict[str, Any]) -> HdlError:
        space = os.statvfs(self.folder)
        return HdlError(
            f"{self.folder}: the disk is full ({space.f_bavail * space.f_frsize:,} bytes are free): no room to cache "
            f"{record['file']} of {record['bytes']:,} bytes; free some or set data.cache to another disk"
        )

    def _make_room(self, needed: int) -> bool:
        """Remove what was left unfinished, and as many files as it takes; False: too many are in use."""
        left = []
        for entry in self._entries():
            if not (entry.unfinished and _removed(entry)):
                left.append(entry)
        total = sum(entry.bytes for entry in left) + needed
        for entry in left:
            if total > self.limit and not entry.unfinished and _removed(entry):
                total -= entry.bytes
        return total <= self.limit

    def _entries(self) -> list[Entry]:
        """The one used longest ago first."""
        entries = []
        with os.scandir(self.folder) as files:
            for found in files:
                if OURS.fullmatch(found.name):
                    with suppress(FileNotFoundError):
                        status = found.stat()
                        entries.append(Entry(Path(found.path), status.st_size, status.st_mtime_ns))
        return sorted(entries, key=lambda entry: entry.used)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        file = locked(self.folder / LOCK_FILE)
        try:
            yield
        finally:
            os.close(file)


def locked(path: Path) -> int:
    """The file of this name, made if need be, open under an exclusive lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(file, fcntl.LOCK_EX)
        if _still(path, file):
            return file
        os.close(file)  # renamed or removed while this waited


def _removed(entry: Entry) -> bool:
    """Whether it is gone now; False: somebody uses it."""
    try:
        file = os.open(entry.path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _still(entry.path, file):
            entry.path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
