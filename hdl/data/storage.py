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
from collections.abc import Generator, Mapping
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
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WORTH_ANOTHER_TRY = (408, 425, 429)  # of the 4xx statuses


class Stream(Protocol):
    """A file being read to its end by one thread; `abort` may come from another. start: where in the file it begins,
    which is 0 where the source gives only whole files."""

    start: int

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
            else:
                self.file, self.start = system.open(path, "rb"), start
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
    start = 0  # a command writes whole files

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


def chunks(source: Source, name: str, stall: float, start: int = 0) -> Generator[tuple[int, bytes]]:
    """A file's bytes as they come, each part with its place; from `start` on, or else from 0. Failure where it does
    not come to its end or nothing comes for `stall` seconds."""
    read: Queue[tuple[int, bytes] | Exception] = Queue(4)
    opened: list[Stream] = []
    given_up = threading.Event()

    def hand_over(item: tuple[int, bytes] | Exception) -> None:
        while not given_up.is_set():
            with suppress(Full):
                return read.put(item, timeout=1)

    def reader() -> None:
        try:
            opened.append(source.open(name, stall, start))
            at, data = opened[0].start, b"-"
            while data and not given_up.is_set():
                data = opened[0].read()
                hand_over((at, data))
                at += len(data)
        except Exception as error:
            hand_over(error)
        finally:
            if given_up.is_set() and opened:  # perhaps before it was open
                opened[0].abort()

    threading.Thread(target=reader, name=f"read {name}", daemon=True).start()
    try:
        while True:
            try:
                item = read.get(timeout=stall)
            except Empty:
                raise Failure(f"nothing came for {stall:g} s") from None
            if isinstance(item, Failure):
                raise item
            if isinstance(item, Exception):
                raise Failure(f"{type(item).__name__}: {item}") from item
            if not item[1]:
                return
            yield item
    finally:
        given_up.set()
        for stream in opened:
            stream.abort()
