"""Host memory that the ranks of a machine share, page-locked so that a GPU can read it on its own.

The memory is a file without a name (memfd): one rank makes it, the others open it through /proc, and everybody
closes it once all have mapped it. The kernel takes it back when the last process that maps it ends, however
it ends, so there is never anything to clean up; and unlike /dev/shm it knows no limit but the machine's.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from hdl.errors import HdlError

NAME = "hdl-weights"  # what /proc/PID/maps shows
GIB = 2**30
Result = TypeVar("Result")


class Ranks(Protocol):
    """The processes of a run, as hdl.engine.processes.Processes has them."""

    def gather(self, thing: Any) -> list[Any]: ...

    def all_or_none(self, error: HdlError | None) -> None: ...


class Alone:
    """One process without a process group."""

    def gather(self, thing: Any) -> list[Any]:
        return [thing]

    def all_or_none(self, error: HdlError | None) -> None:
        if error:
            raise error


class HostMemory:
    """`bytes`: uint8 [size], the same memory in every rank of this machine. `rank` of `ranks`: among those.

    All ranks of the run make it together. HdlError, on all of them, when a machine has not got the memory.
    """

    def __init__(self, size: int, device: torch.device, ranks: Ranks, option: str = "model.stream") -> None:
        """device: whose GPU is to read it; for a CPU the memory is not page-locked. option: that asked for it."""
        me = (_machine(), os.getpid())
        everyone = ranks.gather(me)
        self.rank, self.ranks = _among(everyone, me)
        pids = [pid for machine, pid in everyone if machine == me[0]]

        file = _together(ranks, option, lambda: _create(size) if self.rank == 0 else -1)
        try:
            files = dict(zip(everyone, ranks.gather(file)))
            # Who was about to map it would find the file gone if its maker went on before all have.
            mapped = _together(ranks, option, lambda: _map(pids[0], files[me[0], pids[0]], size))
        finally:
            if self.rank == 0:
                os.close(file)
        self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        if device.type == "cuda":
            address = self.bytes.data_ptr()
            _together(ranks, option, lambda: _lock(address, size))
            weakref.finalize(self, _unlock, address)


def available() -> tuple[int, str]:
    """Bytes of host memory that this process can still get, and who says so: the machine or a cgroup (v2)."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    least = int(meminfo["MemAvailable"].split()[0]) * 1024, "/proc/meminfo"
    root = Path("/sys/fs/cgroup")
    own = next(
        (x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::/")), "0::/"
    )
    folder = root / own.removeprefix("0::/")
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(
                stat["inactive_file"]
            )  # a cache it gives up
            least = min(least, (max(int(text) - used, 0), str(limit)))
        if group == root:
            break
    return least


def first_of_machine(ranks: Ranks) -> bool:
    """Whether this rank is to do what one rank of each machine does. All ranks ask together."""
    me = (_machine(), os.getpid())
    return _among(ranks.gather(me), me)[0] == 0


def machines(ranks: Ranks) -> tuple[list[list[int]], int]:
    """The numbers of the run's ranks, machine by machine, and which of these this rank is on. All ranks ask together."""
    everyone, here = ranks.gather(_machine()), _machine()
    names = list(dict.fromkeys(everyone))
    return [[i for i, name in enumerate(everyone) if name == one] for one in names], names.index(here)


def _among(everyone: Sequence[tuple[Any, int]], me: tuple[Any, int]) -> tuple[int, int]:
    """Which one this rank is among those of its machine, and how many they are."""
    pids = [pid for machine, pid in everyone if machine == me[0]]
    return pids.index(me[1]), len(pids)


def _machine() -> tuple[str, str]:
    """The same for two processes that can open each other's files."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")


def _together(ranks: Ranks, option: str, step: Callable[[], Result]) -> Result:
    """The step's result, if it succeeded in every rank; HdlError otherwise."""
    result, problem = None, None
    try:
        result = step()
    except OSError as error:
        problem = HdlError(
            f"{option}: {error} while getting host memory; take fewer layers, or start one run a machine"
        )
    ranks.all_or_none(problem)
    return result  # type: ignore[return-value]


def _create(size: int) -> int:
    file = os.memfd_create(NAME)
    os.ftruncate(file, size)
    return file


def _map(pid: int, file: int, size: int) -> mmap.mmap:
    opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR)
    try:
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)


def _lock(address: int, size: int) -> None:
    status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if status:
        raise OSError(f"page-locking {size / GIB:.1f} GiB failed with CUDA's error {status}")


def _unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
