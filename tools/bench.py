"""Speed and memory of a training step: ours against what public trainers do, in one process, in turn.

    python tools/bench.py 1024x1 1024x4 2048x1 mixed --arms stock bf16 fp8 --json out.json --profile
    python tools/bench.py 1024x4 --tiny          # a model and images of a few numbers, on the CPU

Random weights of the 8B model's shapes, random pixels and captions. A step is everything: noising, forward, loss,
backward, clipping, optimizer. Arms: stock (transformers, PEFT, full checkpointing, two-pass flash attention), plain
(hdl's reference path), bf16 and fp8 (hdl's fused path).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hdl.bench.arms import ARMS, Setup
from hdl.bench.cases import all_cases
from hdl.bench.command import check_counts, check_gpu, check_json, machine, random_checkpoint
from hdl.bench.report import as_data, as_markdown
from hdl.bench.run import run_cases
from hdl.config import Lora
from hdl.engine.processes import Processes, process_group
from hdl.errors import command_line

ROOT = Path(__file__).resolve().parents[1]
CONFIG_8B = ROOT / "tests/o1/o1-8b-config.json"
CONFIG_TINY = ROOT / "tests/golden/o1-tiny/config.json"
FEWEST_STEPS = 5  # with fewer, the median is not worth printing


def main() -> None:
    args = arguments()
    check(args)
    with common_setup(args) as setup:
        results = run_cases(
            [all_cases(args.tiny)[name] for name in dict.fromkeys(args.cases)],
            list(dict.fromkeys(args.arms)),
            setup,
            steps=args.steps,
            warmup=args.warmup,
            profiled=args.profile,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        about = machine(setup.device) | {"rank": args.rank, "engine": args.engine, "tiny": args.tiny}
    print(f"{', '.join(f'{name} {value}' for name, value in about.items())}\n\n{as_markdown(results)}")
    if args.json:
        data = about | {"warmup": args.warmup, "cases": as_data(results)}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=list(all_cases(tiny=False)), metavar="CASE",
                        help=f"any of {', '.join(all_cases(tiny=False))}")  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["stock", "bf16", "fp8"], metavar="ARM",
                        help=f"any of {', '.join(ARMS)} (default stock bf16 fp8)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each arm (default 7)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each arm before them (default 3)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default 32)")
    parser.add_argument("--engine", choices=("deepspeed", "torch"), default="deepspeed",
                        help="what steps hdl's own arms: DeepSpeed ZeRO-2, as in training (default), or PyTorch's "
                             "fused AdamW alone")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="where hdl's arms spend the GPU's time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny images; runs on a CPU")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """HdlError for what cannot work, before anything is built."""
    check_counts(args, FEWEST_STEPS)
    check_gpu(args.tiny, args.profile)
    check_json(args.json)


@contextmanager
def common_setup(args: argparse.Namespace) -> Iterator[Setup]:
    on_gpu = torch.cuda.is_available()
    config = CONFIG_TINY if args.tiny else CONFIG_8B
    with processes_for(args.engine) as processes:
        yield Setup(
            checkpoint=random_checkpoint(config),
            config_file=config,
            lora=Lora(rank=args.rank, alpha=args.rank),
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            processes=processes,
            engine=args.engine,
            strategy=ROOT / "ds_configs/zero2.json",
        )


@contextmanager
def processes_for(engine: str) -> Iterator[Processes]:
    if engine == "deepspeed":
        with process_group() as processes:
            yield processes
    else:
        yield Processes(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


if __name__ == "__main__":
    command_line(main)
