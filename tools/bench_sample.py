"""Speed and memory of drawing: ours against the stock decoder, in one process, step by step in turn.

    python tools/bench_sample.py 2048x1 1024x8 --arms stock bf16 fp8 --json out.json
    python tools/bench_sample.py 1024x8 --tiny          # a model and pictures of a few numbers, on the CPU

Random weights of the 8B model's shapes with a LoRA on them, random prompts; UniPC with 50 steps and guidance 5, of which
--steps are timed. Arms: stock (transformers and PEFT, text and picture in every pass, a pass a branch), bf16 and fp8
(hdl's fused path, text read once).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from hdl.bench.command import check_counts, check_gpu, check_json, machine, random_checkpoint
from hdl.bench.draw_arms import ARMS, STEPS, DrawSetup, draw_cases
from hdl.bench.draw_run import as_data, as_markdown, run_draw_cases
from hdl.config import Lora
from hdl.errors import HdlError, command_line

ROOT = Path(__file__).resolve().parents[1]
CONFIG_8B = ROOT / "tests/o1/o1-8b-config.json"
CONFIG_TINY = ROOT / "tests/golden/o1-tiny/config.json"
FEWEST_STEPS = 3


def main() -> None:
    args = arguments()
    check(args)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    config = CONFIG_TINY if args.tiny else CONFIG_8B
    setup = DrawSetup(
        random_checkpoint(config), config, Lora(rank=args.rank, alpha=args.rank), device,
        torch.bfloat16 if on_gpu else torch.float32,
    )  # fmt: skip
    results = run_draw_cases(
        [draw_cases(args.tiny)[name] for name in dict.fromkeys(args.cases)],
        list(dict.fromkeys(args.arms)),
        setup,
        steps=args.steps,
        warmup=args.warmup,
        profiled=args.profile,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    about = machine(device) | {"rank": args.rank, "tiny": args.tiny}
    print(f"{', '.join(f'{name} {value}' for name, value in about.items())}\n\n{as_markdown(results)}")
    if args.json:
        data = about | {"warmup": args.warmup, "cases": as_data(results)}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=list(draw_cases(tiny=False)), metavar="CASE",
                        help=f"any of {', '.join(draw_cases(tiny=False))}")  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
                        help=f"any of {', '.join(ARMS)} (default: all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each arm (default 7)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each arm before them (default 3)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default 32)")
    parser.add_argument("--profile", action="store_true", help="where hdl's arms spend the GPU's time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny pictures; runs on a CPU")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """HdlError for what cannot work, before anything is built."""
    check_counts(args, FEWEST_STEPS)
    if args.warmup + 1 + args.steps > STEPS:
        raise HdlError(
            f"--warmup {args.warmup} and --steps {args.steps}: a picture has {STEPS} steps, one of them uncounted"
        )
    check_gpu(args.tiny, args.profile)
    check_json(args.json)


if __name__ == "__main__":
    command_line(main)
