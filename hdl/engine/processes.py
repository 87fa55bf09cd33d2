"""The process group: one process a GPU, or several on the CPU, as torchrun starts them.

Run without torchrun, a process is a world of one. Without a GPU the group talks over gloo and DeepSpeed
is told to use its CPU accelerator.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hdl.engine.ending import follow_torchrun
from hdl.errors import HdlError

TIMEOUT = timedelta(minutes=30)  # of a collective: ranks may load a checkpoint at different speeds
MEETING = timedelta(minutes=5)  # for all processes to find each other
DESCRIBED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # the group, in the environment


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor on this rank's device over all ranks, in place; every rank gets the sum. On a GPU
        the sum is queued, not waited for."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's object, on every rank, in rank order."""
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def all_or_none(self, error: HdlError | None) -> None:
        """If any rank has an error, every rank raises it, so that none is left waiting for another."""
        errors = [e for e in self.gather(str(error) if error else None) if e]
        if errors:
            raise HdlError("; ".join(dict.fromkeys(errors)), on_all_ranks=True)


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join the group torchrun describes in the environment; leave it at the end.

    A rank that fails alone does not leave it, as that would take the others. HdlError when the environment describes
    no group, or its processes do not find each other.
    """
    alone = check_described(os.environ)
    if alone:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise HdlError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start torchrun "
                "with --nproc_per_node at most that, or set DS_ACCELERATOR=cpu"
            )
        check_nccl()
        _use_expandable_segments()
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        _use_deepspeed_on_cpu()
        device = torch.device("cpu")
    follow_torchrun()
    store, rank, world = meet()
    backend = "nccl" if use_gpu else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device if use_gpu else None,
    )
    try:
        yield Processes(rank, world, device)
    except BaseException as error:
        if world == 1 or getattr(error, "on_all_ranks", False):
            _leave()
        raise
    else:
        _leave()


def check_described(environment: Mapping[str, str]) -> bool:
    """Whether the environment describes no group, so that this process is alone; HdlError when it does by half."""
    given = [name for name in DESCRIBED if environment.get(name)]
    if "RANK" not in given and environment.get("WORLD_SIZE", "1") == "1":
        return True
    missing = [name for name in DESCRIBED if name not in given]
    if missing:
        raise HdlError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with torchrun, which sets all of "
            f"them, or set all of {', '.join(DESCRIBED)} in every process"
        )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not environment.get(name, "0").isdecimal():
            raise HdlError(f"the environment sets {name}={environment[name]}, expected a whole number")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise HdlError(
            f"the environment sets RANK={environment['RANK']} with WORLD_SIZE={environment['WORLD_SIZE']}; ranks are "
            "counted from 0"
        )
    return False


def check_nccl() -> None:
    """HdlError where GPUs could not talk to each other."""
    if not dist.is_nccl_available():
        raise HdlError(
            f"PyTorch {torch.__version__} is built without NCCL, over which GPUs talk; install a build for CUDA on "
            "Linux, or set DS_ACCELERATOR=cpu"
        )


def meet() -> tuple[dist.Store, int, int]:
    """All processes' store, this one's rank, and how many there are."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    except (dist.DistError, RuntimeError) as error:
        raise HdlError(
            f"the processes of this job did not meet at {where} (MASTER_ADDR:MASTER_PORT) within {MEETING.seconds} s "
            f"({str(error).splitlines()[0]}); check the address, and that every process has been started"
        ) from None
    store.set_timeout(TIMEOUT)
    # torchrun keeps one store over all its attempts: who reads another's address there before that one has written
    # it anew would connect to the dead
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store), rank, world


def _leave() -> None:
    dist.destroy_process_group()
    # gloo's threads outlive the group and still let go of the last collective's tensors, for which they
    # need the interpreter: one that has begun to shut down aborts instead. Sleeping hands it to them.
    time.sleep(0.25)


def _use_expandable_segments() -> None:
    """Let PyTorch's allocator grow and shrink its memory piece by piece, so that what one size of batch leaves
    serves the next; the user's own settings come first. Said to PyTorch itself: it read the environment when it was
    imported."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _use_deepspeed_on_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops  # reads the variable when it is imported

    # DeepSpeed would compile a shared-memory collective here, which takes a compiler and a minute; gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
