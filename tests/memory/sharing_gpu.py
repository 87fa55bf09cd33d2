"""Shared layers on GPUs, over NCCL: replayed and plain passes give the numbers of the same linears where they are.

torchrun --nproc_per_node=2 -m tests.memory.sharing_gpu        or without torchrun, a group of one
"""

import os
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from hdl.kernels import gemm
from hdl.kernels.fuse import STREAMED, fuse, fuse_with
from hdl.kernels.scratch import Scratch
from hdl.o1.config import O1Config
from hdl.o1.layout import Segment
from tests.kernels.test_fused import REAL, Case, adapted_model
from tests.memory.sharing_ranks import CONFIG, Group, assert_same_steps, decoder_of, drawn

# By rank and step; ranks need not have graphs of the same sizes, nor capture at the same time.
SIZES = [
    [[Segment(9, 4, 3)], [Segment(9, 4, 3)], [Segment(5, 2, 3), Segment(7, 3, 3)], [Segment(9, 4, 3)]],
    [[Segment(7, 3, 3)], [Segment(60, 9, 10)], [Segment(7, 3, 3)], [Segment(5, 2, 3), Segment(7, 3, 3)]],
]


def in_bfloat16(case: Case) -> Case:
    case.text, case.z = case.text.bfloat16(), case.z.bfloat16()
    return case


def check(config: O1Config, form: str, replays: bool, keep: str = "everything") -> None:
    model, same = (adapted_model(config, torch.bfloat16) for _ in range(2))
    fuse(model, weights=form, keep=keep, shard=config.num_hidden_layers, ranks=Group())
    fuse_with(same, partial(STREAMED[form], scratch=Scratch()), keep)
    plain, graphs = decoder_of(same).graphs, decoder_of(model).graphs
    assert plain and graphs
    plain._enabled, graphs._enabled = False, replays
    sizes = SIZES[dist.get_rank() % 2]
    cases = [in_bfloat16(Case(config, segments, seed)) for seed, segments in enumerate(sizes)]
    assert_same_steps(model, same, cases)
    assert torch.equal(drawn(model, cases[2]), drawn(same, cases[2]))
    assert_same_steps(model, same, list(reversed(cases)))
    assert bool(graphs.captured) == replays


def main() -> None:
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29571",
    }
    if "RANK" not in os.environ:
        os.environ.update(alone)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    gemm.measure = False  # whoever wins a race sums in an order of its own
    for form in ("full", "fp8", "fp8_once", "fp8_stored", "nf4"):
        for replays in (True, False):
            check(CONFIG, form, replays)
            print(f"rank {dist.get_rank()}: {form}, {'replayed' if replays else 'plain'}: equal", flush=True)
    for form in (
        "full",
        "fp8",
    ):  # blocks of 0.4 and 0.2 GB take long enough that a wait that is missing shows
        for replays in (True, False):
            check(replace(REAL, num_hidden_layers=5), form, replays, "products")
            print(f"rank {dist.get_rank()}: {form}, 8B shapes, replays {replays}: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
