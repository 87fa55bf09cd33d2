"""The process group: one process a GPU, or several on the CPU, as torchrun starts them.

Run without torchrun, a process is a world of one. Without a GPU the group talks over gloo and DeepSpeed
is told to use its CPU accelerator.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hdl.errors import HdlError

TIMEOUT = timedelta(minutes=30)


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
    """Join the group torchrun describes in the environment; leave it at the end, whatever happens."""
    if "RANK" not in os.environ:
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
        _use_expandable_segments()
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        _use_deepspeed_on_cpu()
        device = torch.device("cpu")
    dist.init_process_group(
        "nccl" if use_gpu else "gloo", timeout=TIMEOUT, device_id=device if use_gpu else None
    )
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
        # gloo's threads outlive the group and still let go of the last collective's tensors, for which they
        # need the interpreter: one that has begun to shut down aborts instead. Sleeping hands it to them.
        time.sleep(0.25)


def _use_expandable_segments() -> None:
    """Let PyTorch's allocator grow and shrink its memory piece by piece, so that what one size of batch leaves
    serves the next; the user's own settings come first. It reads them when it is first asked for memory."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _use_deepspeed_on_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops  # reads the variable when it is imported

    # DeepSpeed would compile a shared-memory collective here, which takes a compiler and a minute; gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
