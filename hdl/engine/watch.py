"""A rank that dies or hangs ends the job, with one error that names it.

A collective with a dead rank waits, on a GPU for ever. So every rank has two threads beside its work. One tells the
store that torchrun (or rank 0) keeps for the group that the rank lives and which step it is at, and reads the same of
the others. The other judges what has been read, and ends the process when

    a rank of this machine is no more        at once; other machines' ranks are silent then
    a rank has been silent                   for train.patience seconds: its process is stopped, its machine gone
    a rank keeps the others waiting          the same time, at a step: its main thread hangs
    the store has not answered               the same time: the network or the launcher is gone

The first to see it says it; the others end silently. A rank whose main thread hangs shows where, before; if it is on
this machine it is killed, so that the launcher need not wait for it. Waiting is measured with each rank's own clock:
their wall clocks need not agree.
"""

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import NoneType, TracebackType
from typing import NoReturn

import torch.distributed as dist

from hdl.engine.ending import end
from hdl.engine.processes import Processes

SHOW = 0.7  # of the patience, after which a rank that hangs shows where
PAUSE = 1.0  # seconds between beats, and between judgements
FATE, SAID = "fate", "said"  # keys: a rank failed by itself; somebody has told the user


@dataclass(frozen=True)
class Home:
    """Where a rank's process is."""

    host: str
    namespace: str  # of process ids: containers of one host do not see each other's
    pid: int
    started: str  # since boot: a later process may have the same id

    @classmethod
    def of(cls, pid: int) -> "Home":
        return cls(socket.gethostname(), os.readlink("/proc/self/ns/pid"), pid, _started(pid) or "")

    def is_here(self) -> bool:
        return self.host == socket.gethostname() and self.namespace == os.readlink("/proc/self/ns/pid")

    def is_dead(self) -> bool:
        return self.is_here() and _started(self.pid) != self.started

    def kill(self) -> None:
        if self.is_here() and not self.is_dead():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass
class Pace:
    """How long a rank has been at one step while others have come further. Its step may be known late, so that it
    seems to be behind most of the time: it is held up only if its step does not change."""

    step: int = -1
    since: float | None = None

    def held_up(self, step: int, first: int, excused: bool, now: float) -> float:
        """Seconds. first: the step of those that have come furthest."""
        if step != self.step or step < 0 or step >= first or excused:
            self.step, self.since = step, None
            return 0.0
        self.since = self.since or now
        return now - self.since


@dataclass
class Peer:
    """What is known of another rank."""

    home: Home
    beat: str = ""
    heard: float = 0.0  # when its beat last changed
    step: int = -1
    excused: bool = False
    pace: Pace = field(default_factory=Pace)
    left: bool = False


class Watch:
    """Entered by every rank of a job for as long as it works with the others."""

    def __init__(self, processes: Processes, patience: float) -> None:
        """patience: seconds."""
        self.rank, self.world, self.patience = processes.rank, processes.world, patience
        self._step, self._excused = -1, False
        self._pace, self._shown = Pace(), False  # shown: where this rank hangs
        homes = processes.gather((Home.of(os.getpid()), os.urandom(4).hex()))
        self._peers = {r: Peer(home) for r, (home, _) in enumerate(homes) if r != self.rank}
        self._over = threading.Event()
        self._contact = time.monotonic()
        self._failed: float | None = None  # since when it is known that a rank has
        self._talking: threading.Thread | None = None
        if self.world > 1:
            self._where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            self._store = self._connect(homes[0][1])
            self._store.set(f"beat {self.rank}", "0 -1 0")
            if self.rank == 0:
                self._store.set(FATE, "")
            processes.all_or_none(None)  # all keys are there now

    def __enter__(self) -> "Watch":
        self._contact = time.monotonic()
        for peer in self._peers.values():
            peer.heard = self._contact
        if self.world > 1:
            threading.Thread(target=self._judge, name="judge", daemon=True).start()
            self._talking = threading.Thread(target=self._talk, name="talk", daemon=True)
            self._talking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        everyone = isinstance(error, (NoneType, KeyboardInterrupt)) or getattr(error, "on_all_ranks", False)
        if self.world > 1 and not everyone:
            if is_consequence(error):
                time.sleep(self.patience + 10 * PAUSE)  # the judge ends the process before that
            else:
                with suppress(RuntimeError):
                    self._store.set(FATE, f"rank {self.rank} failed")
        self._over.set()
        if self._talking:
            self._talking.join(2 * PAUSE)
            with suppress(RuntimeError):
                self._store.set(f"beat {self.rank}", "left -1 0")

    def at(self, step: int) -> None:
        """This rank has all it needs of its own for a step. To be called once the others cannot be held up by what
        only the first steps do, such as compiling."""
        self._step = step

    @contextmanager
    def excused(self) -> Iterator[None]:
        """While entered, this rank keeps the others waiting for a reason."""
        self._excused = True
        try:
            yield
        finally:
            self._excused = False

    def _connect(self, job: str) -> dist.Store:
        host, port = self._where.rsplit(":", 1)
        store = dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self.patience)
        )
        return dist.PrefixStore(f"hdl watch {job}", store)

    def _talk(self) -> None:
        keys = [f"beat {rank}" for rank in range(self.world)]
        beats = 0
        while not self._over.wait(PAUSE):
            beats += 1
            try:
                self._store.set(keys[self.rank], f"{beats} {self._step} {int(self._excused)}")
                *told, fate = self._store.multi_get([*keys, FATE])
            except RuntimeError:
                continue  # the judge sees that there is no contact
            now = time.monotonic()
            for rank, peer in self._peers.items():
                beat = told[rank].decode()
                if beat != peer.beat:
                    number, step, excused = beat.split()
                    peer.beat, peer.heard, peer.left = beat, now, number == "left"
                    peer.step, peer.excused = int(step), excused == "1"
            if fate and self._failed is None:
                self._failed = now
            self._contact = now

    def _judge(self) -> None:
        dead: set[int] = set()
        woken = time.monotonic()
        while not self._over.wait(PAUSE):
            now = time.monotonic()
            if now - woken > 5 * PAUSE:  # this process was stopped, and knows nothing of that time
                self._contact = now
                for peer in self._peers.values():
                    peer.heard, peer.pace = now, Pace()
            woken = now
            if self._failed is not None and now - self._failed > 3 * PAUSE:
                self._end(None)  # that rank has said it meanwhile
            dead_now = {r for r, p in self._peers.items() if not p.left and p.home.is_dead()}
            for rank in dead & dead_now:  # twice, for a rank that has left and could not say so yet
                home = self._peers[rank].home
                self._end(f"rank {rank} (process {home.pid} on {home.host}) is dead")
            dead = dead_now
            if now - self._contact > self.patience:
                self._end(
                    f"rank {self.rank} on {socket.gethostname()} has had no answer from the job's store at "
                    f"{self._where} for {now - self._contact:.0f} s: the network, rank 0's machine or torchrun is gone"
                )
            self._judge_peers(now)

    def _judge_peers(self, now: float) -> None:
        first = max([self._step, *(p.step for p in self._peers.values())])
        held_up = self._pace.held_up(self._step, first, self._excused, now)
        if held_up > SHOW * self.patience and not self._shown:
            self._shown = True
            os.write(2, f"\nrank {self.rank} keeps the others waiting, and this is where it is:\n".encode())
            faulthandler.dump_traceback(file=2)
        for rank, peer in self._peers.items():
            home = peer.home
            if peer.left:
                continue
            if now - peer.heard > self.patience:
                self._end(
                    f"rank {rank} (process {home.pid} on {home.host}) has been silent for {now - peer.heard:.0f} s: it is "
                    "stopped, or its machine or network is gone",
                    peer,
                )
            held_up = peer.pace.held_up(peer.step, first, peer.excused, now)
            if held_up > self.patience:
                self._end(
                    f"rank {rank} (process {home.pid} on {home.host}) has kept the others waiting at step {first + 1} for "
                    f"{held_up:.0f} s: it hangs, or its disk does (train.patience {self.patience:g})",
                    peer,
                )

    def _end(self, message: str | None, culprit: Peer | None = None) -> NoReturn:
        """End this process; the first of the job to do so tells why."""
        first = threading.Event()
        if message:

            def ask() -> None:  # in a thread, as the store may not answer
                with suppress(RuntimeError):
                    if self._store.add(SAID, 1) > 1:
                        return
                first.set()

            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(2 * PAUSE)
            if asking.is_alive():
                first.set()
        if culprit:
            culprit.home.kill()
        end(message if first.is_set() else None)


def is_consequence(error: BaseException | None) -> bool:
    """Whether an error says no more than that another rank, or the way to it, is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(
            word in str(error) for word in ("gloo", "NCCL", "onnection closed by peer", "onnection reset")
        )
    )


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since boot; None when there is none, or only its remains."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
