"""Where prepared shards lie when it is not a folder here, and reading a file from there as it comes.

    s3://bucket/set  gs://...  https://...      any URL that fsspec opens, or a package of its own for it
    pipe:ssh store cat /data/{file}             a shell command a file, in WebDataset's manner

Unusual: few of the libraries behind a URL notice a connection that has fallen silent. So a file is read in a
thread of its own and what it reads is waited for with a limit; a thread that is stuck is left behind.
"""

import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import killpg
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

import fsspec
from fsspec.registry import known_implementations

from hdl.errors import HdlError

CHUNK = 2**20  # bytes read at once
SECOND_AFTER = 0.25  # of the silence after which a connection is given up
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WORTH_ANOTHER_TRY = (408, 425, 429)  # of the 4xx statuses


class Stream(Protocol):
    """A file being read to its end by one thread; `abort` may come from another. start: where in the file it begins,
    which is 0 where the source gives only whole files; in_parts: whether it is known to give others."""

    start: int
    in_parts: bool

    def read(self) -> bytes:
        """The next bytes; none at the end. Raises where what came is not the whole file."""

    def abort(self) -> None:
        """Give up, so that a `read` that waits ends soon where that is possible."""


class Source(Protocol):
    def open(self, name: str, stall: float, start: int = 0) -> Stream:
        """start: bytes of the file that are here already and need not come again, if that can be."""

    def shown(self, name: str = "") -> str:
        """For messages: the place, or a file there, without passwords and signatures."""


class Failure(Exception):
    """A file did not come, or not whole. final: asking again would give the same answer."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def source_of(location: str | Path, storage: Mapping[str, Any]) -> Source | None:
    """The place that a location names; None: a folder here.

    storage: options for fsspec's file system. HdlError where nothing here can read such a URL.
    """
    if isinstance(location, Path) or location.startswith(("file://", "local://")):
        return None
    if location.startswith("pipe:"):
        return Pipe(location.removeprefix("pipe:").strip())
    return Url(location, dict(storage)) if URL.match(location) else None


def folder_of(location: str | Path) -> Path:
    """A location that is a folder here, as a path."""
    return Path(re.sub("^(file|local)://", "", str(location))).expanduser()


@dataclass(frozen=True)
class Url:
    """base: the folder's URL; a query string in it (a signature) is kept for each file."""

    base: str
    storage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        protocol = self.base.split("://")[0].lower()
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or known_implementations[protocol]["class"]
            package = package.split(".")[0]
            raise HdlError(
                f"{self.shown()}: reading {protocol}:// needs a package that is not installed; "
                f"pip install {package}"
            ) from None
        except ValueError:
            raise HdlError(
                f"{self.shown()}: fsspec knows no {protocol}://; give a folder, a URL such as s3://, gs:// or "
                'https://, or "pipe:COMMAND with {file}"'
            ) from None

    def open(self, name: str, stall: float, start: int = 0) -> Stream:
        return UrlStream(self._url(name), self.storage, stall, start)

    def shown(self, name: str = "") -> str:
        return re.sub("://[^/@]*@", "://", self._url(name).partition("?")[0])

    def _url(self, name: str) -> str:
        if not self.base.startswith(("http://", "https://")):
            return f"{self.base.rstrip('/')}/{name}".rstrip("/")
        base, mark, query = self.base.partition("?")
        return f"{base.rstrip('/')}/{name}".rstrip("/") + mark + query


class UrlStream:
    def __init__(self, url: str, storage: dict[str, Any], stall: float, start: int = 0) -> None:
        self.http = url.startswith(("http://", "https://"))
        try:
            system, path = fsspec.url_to_fs(url, **storage)
            if self.http:
                self.file = system.open(path, "rb", **_http_options(system, stall, start))
                self.start = start if self._begins_at(start) else 0
                self.in_parts = self.start > 0 or self.file.r.headers.get("Accept-Ranges") == "bytes"
            else:
                self.file, self.start, self.in_parts = system.open(path, "rb"), start, True
                self.file.seek(start)
        except Exception as error:  # each library behind fsspec has its own
            raise self._failure(error) from error

    def _begins_at(self, start: int) -> bool:
        """Whether the server gives the part that was asked for; not all know how to."""
        answer = self.file.r
        return answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")

    def read(self) -> bytes:
        try:
            data: bytes = self.file.read(CHUNK)
            if not data:
                self.file.close()
        except Exception as error:
            raise self._failure(error) from error
        return data

    def abort(self) -> None:
        if self.http:  # elsewhere closing is not meant for another thread than the one that reads
            with suppress(Exception):
                self.file.close()

    def _failure(self, error: Exception) -> Failure:
        status = getattr(error, "status", None)
        if self.http and isinstance(error, FileNotFoundError):
            status = 404  # fsspec makes the one of the other
        if isinstance(status, int) and status >= 400:
            message = f"HTTP status {status} {getattr(error, 'message', '')}".rstrip()
            return Failure(message, final=status < 500 and status not in WORTH_ANOTHER_TRY)
        final = isinstance(error, (FileNotFoundError, PermissionError, TypeError, ValueError))
        return Failure(f"{type(error).__name__}: {error}".rstrip(": "), final)


def _http_options(system: Any, stall: float, start: int) -> dict[str, Any]:
    import aiohttp

    part = {}
    if start:  # headers given here take the place of those in data.storage
        asked = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        part = {"headers": {**system.kwargs.get("headers", {}), **asked}}
    return part | {
        "block_size": 0,  # one request, read as it comes
        "size": 1,  # any number: fsspec need not ask for it first
        "read_bufsize": 2 * CHUNK,
        # fsspec's own limit is five minutes a file. These end a silent connection that was left behind.
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=2 * stall),
    }


@dataclass(frozen=True)
class Pipe:
    """command: of a shell, writes a file to its standard output; {file} in it stands for the file's name."""

    command: str

    def __post_init__(self) -> None:
        if "{file}" not in self.command:
            raise HdlError(
                f"{self.shown()}: the command names no {{file}}; expected something like "
                '"pipe:ssh store cat /data/{file}"'
            )

    def open(self, name: str, stall: float, start: int = 0) -> Stream:
        return PipeStream(self.command.replace("{file}", shlex.quote(name)))

    def shown(self, name: str = "") -> str:
        return f"pipe:{self.command.replace('{file}', name) if name else self.command}"


class PipeStream:
    start, in_parts = 0, False  # a command writes whole files

    def __init__(self, command: str) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the command runs
        self.process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors,
            start_new_session=True, bufsize=0,
        )  # fmt: skip  # a session of its own: the shell's children can be ended with it

    def read(self) -> bytes:
        assert self.process.stdout is not None
        data: bytes = self.process.stdout.read(CHUNK)
        if not data:
            self.process.stdout.close()
            status = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip()[-500:]
            self.errors.close()
            if status:
                raise Failure(f"the command ended with exit status {status}: {said or 'it said nothing'}")
        return data

    def abort(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Reader:
    """A thread that reads a file from `start` on into a queue of (reader, what it read with its place, or the
    exception that ended it)."""

    def __init__(self, source: Source, name: str, stall: float, start: int, into: "Queue[Read]") -> None:
        self.into, self.given_up = into, threading.Event()
        self.stream: Stream | None = None
        arguments = (source, name, stall, start)
        threading.Thread(target=self._read, args=arguments, name=f"read {name}", daemon=True).start()

    def give_up(self) -> None:
        self.given_up.set()
        if self.stream:
            self.stream.abort()

    def can_be_joined(self) -> bool:
        """Whether another reader could go on in the middle of the file."""
        return self.stream is not None and self.stream.in_parts

    def _read(self, source: Source, name: str, stall: float, start: int) -> None:
        try:
            self.stream = source.open(name, stall, start)
            at, data = self.stream.start, b"-"
            while data and not self.given_up.is_set():
                data = self.stream.read()
                self._hand_over((at, data))
                at += len(data)
        except Exception as error:
            self._hand_over(error)
        finally:
            if self.given_up.is_set() and self.stream:  # perhaps before it was open
                self.stream.abort()

    def _hand_over(self, item: "tuple[int, bytes] | Exception") -> None:
        while not self.given_up.is_set():
            with suppress(Full):
                return self.into.put((self, item), timeout=1)


Read = tuple[Reader, tuple[int, bytes] | Exception]


def chunks(
    source: Source, name: str, stall: float, start: int = 0, note: Callable[[str], None] = lambda text: None
) -> Generator[tuple[int, bytes]]:
    """A file's bytes as they come, each part with its place; from `start` on, or else from 0.

    After a part of `stall` in silence in the middle of a file, the rest is asked for on a second connection, and
    whichever brings something first is kept; `note` is told. Failure where the file does not come to its end or
    nothing comes for `stall` seconds."""
    read: Queue[Read] = Queue(4)
    readers = [Reader(source, name, stall, start, read)]
    at, last = start, time.monotonic()
    try:
        while True:
            second = len(readers) == 1 and readers[0].can_be_joined()
            limit = stall * SECOND_AFTER if second else stall
            try:
                reader, item = read.get(timeout=max(0.0, last + limit - time.monotonic()))
            except Empty:
                if time.monotonic() - last >= stall:
                    raise Failure(f"nothing came for {stall:g} s") from None
                if len(readers) == 1 and readers[0].can_be_joined():
                    note(f"nothing came for {limit:g} s, the rest was asked for again beside it")
                    readers.append(Reader(source, name, stall, at, read))
                continue
            if reader not in readers:
                continue
            if isinstance(item, Exception):
                reader.give_up()
                readers.remove(reader)
                if readers:  # the other may still bring it
                    continue
                if isinstance(item, Failure):
                    raise item
                raise Failure(f"{type(item).__name__}: {item}") from item
            for other in readers:
                if other is not reader:
                    other.give_up()
            readers, last = [reader], time.monotonic()
            if not item[1]:
                return
            at = item[0] + len(item[1])
            yield item
            last = time.monotonic()  # what was made of it took time, too
    finally:
        for reader in readers:
            reader.give_up()
