"""Two machines for the tests, in this one: a network, host name, processes and mounts of their own each, and a cable.

Unusual: a node is a process in new namespaces, and everything that is started on it dies with that process, which dies
with this one however it ends. Nothing of it is ever visible to the machine's own network: both ends of the cable are
made inside.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def lacking() -> str | None:
    """Why there can be no nodes here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root; this is not root"
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv") if not shutil.which(name, path=PATH)]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        [*UNSHARE, "ip", "link", "add", "name", "cable", "type", "veth"], capture_output=True
    )
    return f"no namespaces joined by veth: {tried.stderr.decode().strip()}" if tried.returncode else None


@dataclass
class Node:
    pid: int  # of its first process, as this machine counts
    address: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def _entered(self, pids: bool = True) -> list[str]:
        ids = ["--mount", "--pid"] if pids else []
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", *ids]

    def do(self, *command: str, pids: bool = True) -> None:
        """pids: process ids are the node's own, not this machine's."""
        done = subprocess.run(
            [*self._entered(pids), *command], capture_output=True, text=True, env=os.environ | {"PATH": PATH}
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def start(
        self, *command: str | Path, cwd: Path, env: Mapping[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """log: of its output and errors."""
        self.started.append(
            subprocess.Popen(
                [*self._entered(), f"--wd={cwd}", *command],
                env=dict(env),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
        return self.started[-1]

    def cable(self, state: str) -> None:
        """up or down."""
        self.do("ip", "link", "set", "cable", state)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(number)) for number in (1, 2)]
        one, two = nodes
        one.do(
            "ip",
            "link",
            "add",
            "name",
            "cable",
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            str(two.pid),
            pids=False,
        )
        for node in nodes:
            node.do("ip", "address", "add", f"{node.address}/24", "dev", "cable")
            node.do("ip", "link", "set", "lo", "up")
            node.cable("up")
        yield one, two


@contextmanager
def _node(number: int) -> Iterator[Node]:
    keeper = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *UNSHARE, "sleep", "infinity"])
    node = None
    try:
        until = time.monotonic() + 30
        while not (inside := _sleepers(keeper.pid)):
            assert keeper.poll() is None and time.monotonic() < until, "unshare started nothing"
            time.sleep(0.05)
        node = Node(inside[0], f"10.86.0.{number}")
        node.do("hostname", f"hdl-node{number}")  # which nobody can look up
        yield node
    finally:
        keeper.kill()
        keeper.wait()
        for process in node.started if node else []:
            process.wait(60)


def _sleepers(parent: int) -> list[int]:
    """Its children that have become `sleep`: their namespaces are complete."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, fields = stat.read_text().split("(", 1)[1].rsplit(")", 1)
            if name == "sleep" and int(fields.split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found
