"""A web server for a folder of shards whose connections fail as real ones do, in a thread or a process of its own.

Which request fails and how is a function of the seed, the file and how often it was asked for before.

    error      status 500, or a connection that is reset, half of the time after part of the file
    stall      part of the file, then silence
    truncate   part of the file, then an orderly end
    damage     the whole file with some bytes changed; of index.json, which nothing vouches for, as it is

Who asks for the rest of a file (Range) is given that, as by most servers; then all this is said of the rest.
"""

import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 256 * 1024


@dataclass(frozen=True)
class Faults:
    """Shares of the requests."""

    error: float = 0.0
    stall: float = 0.0
    truncate: float = 0.0
    damage: float = 0.0
    seed: int = 0

    def of(self, name: str, asked: int) -> tuple[str, float]:
        """The fault of a request, "" for none, and after which part of the file."""
        draw = random.Random(f"{self.seed} {name} {asked}")
        chance, part = draw.random(), draw.random()
        for kind in ("error", "stall", "truncate", "damage"):
            share: float = getattr(self, kind)
            if chance < share:
                if kind == "damage" and name == "index.json":
                    return "", part
                return (draw.choice(["status", "reset"]) if kind == "error" else kind), part
            chance -= share
        return "", part


class ShardServer(ThreadingHTTPServer):
    """Serves a folder on a free port here. rate: bytes a second over all connections, None for no limit.

    asked: file -> requests so far; resumed: those among them that were for the rest of it. ranges: whether that can be
    had; without, the answer is the whole file. faults may be replaced at any time. key: what a request's X-Key must be,
    else it is answered with 403; None: anything. lingers: seconds before a connection that is to break off does, since
    a reader that finds it broken never sees what came last. `with` runs it in a thread.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, faults: Faults | None = None, rate: float | None = None, ranges: bool = True
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.rate = folder, faults or Faults(), rate
        self.ranges = ranges
        self.asked: Counter[str] = Counter()
        self.resumed: Counter[str] = Counter()
        self.key: str | None = None
        self.lingers = 0.0
        self.closing = threading.Event()
        self._lock, self._free = threading.Lock(), 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "ShardServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def count(self, name: str) -> int:
        with self._lock:
            self.asked[name] += 1
            return self.asked[name] - 1

    def pace(self, size: int) -> None:
        """Wait until this much may be sent."""
        if self.rate:
            with self._lock:
                self._free = max(self._free, time.monotonic() - 0.05) + size / self.rate
                wait = self._free - time.monotonic()
            if wait > 0:
                time.sleep(wait)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up: that is what they are here for."""


class Handler(BaseHTTPRequestHandler):
    server: ShardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        path = self.server.folder / name
        asked = self.server.count(name)
        if self.server.key is not None and self.headers["X-Key"] != self.server.key:
            return self._say(403)
        if not path.is_file():
            return self._say(404)
        fault, part = self.server.faults.of(name, asked)
        if fault == "status":
            return self._say(500)
        whole = path.stat().st_size
        first = self._first(whole)
        size = whole - first
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(size))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if first:
            self.server.resumed[name] += 1
            self.send_header("Content-Range", f"bytes {first}-{whole - 1}/{whole}")
        self.end_headers()
        stop = int(size * part) if fault in ("reset", "stall", "truncate") else size
        with open(path, "rb") as file:
            file.seek(first)
            self._send(file.read, stop, damaged_at=int(size * part) if fault == "damage" else None)
        if fault in ("reset", "truncate"):
            self.server.closing.wait(self.server.lingers)
        if fault == "stall":
            self.server.closing.wait(60)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if stop < size:
            self.close_connection = True

    def _first(self, size: int) -> int:
        """Where what is asked for begins: Range says "bytes=N-", or there is none."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        return int(asked[1]) if asked and self.server.ranges and int(asked[1]) < size else 0

    def _send(self, read: Callable[[int], bytes], stop: int, damaged_at: int | None) -> None:
        sent = 0
        while sent < stop:
            data = read(min(CHUNK, stop - sent))
            if damaged_at is not None and sent <= damaged_at < sent + len(data):
                data = bytes(255 - byte for byte in data[:64]) + data[64:]
            self.server.pace(len(data))
            self.wfile.write(data)
            sent += len(data)

    def _say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def in_a_process(folder: Path, faults: Faults, rate: float | None) -> Iterator[str]:
    """The server's URL; it ends with the block."""
    described = json.dumps({"folder": str(folder), "faults": asdict(faults), "rate": rate})
    process = subprocess.Popen(
        [sys.executable, "-m", "hdl.bench.shard_server", described],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def main() -> None:
    described = json.loads(sys.argv[1])
    with ShardServer(Path(described["folder"]), Faults(**described["faults"]), described["rate"]) as server:
        print(server.url, flush=True)
        os.read(0, 1)  # until whoever started this is gone


if __name__ == "__main__":
    main()
