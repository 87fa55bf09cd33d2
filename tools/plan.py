"""What a run needs of a GPU's memory, and the fastest way to fit a card.

    python tools/plan.py --card 24 --size 2048x2048
    python tools/plan.py --card 16 --size 1024x1024 --images 4 --rank 16 --write launch/presets/my16gb.toml

For every form of the frozen weights: how many layers' weights are streamed from host memory and how many layers'
activations wait there, the fastest levels of recomputation that fit, where the bytes go, and the step time on a GPU
whose rates were measured. 1 GiB of the card is left to others (the desktop, CUDA itself).
"""

import argparse
import math
from pathlib import Path

import tomli_w

from hdl.errors import HdlError, command_line
from hdl.memory.plan import GIB, GPUS, OPTIMIZERS, Choice, Host, Work, as_preset, choices, mix
from hdl.o1.config import read_config
from hdl.o1.patches import PATCH

CONFIG_8B = Path(__file__).resolve().parents[1] / "tests/o1/o1-8b-config.json"
RESERVED = 1.0  # GiB


def main() -> None:
    args = arguments()
    height, width = size(args.size)
    work = Work.of_images(height, width, args.images, args.text)
    found = choices(
        read_config(args.base / "config.json" if args.base else CONFIG_8B),
        args.rank,
        work,
        args.optimizer,
        args.gpus,
        (args.card - RESERVED) * GIB,
        GPUS[args.gpu],
        Host(args.host * GIB, args.gpus),
    )
    print(
        f"{args.images} x {width}x{height} px and {args.text} text tokens a GPU, LoRA rank {args.rank}, {args.optimizer}, "
        f"{args.gpus} GPU(s) with {args.card:g} GiB; times as on an {args.gpu.upper()}\n"
    )
    print(
        "| weights | streamed | offloaded | keep | weights | adapter | activations | workspace | peak GiB | "
        "on the host | ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for choice in found:
        print(row(choice, args.gpus))
    best = found[0].strategy
    if best is None:
        least = min(found, key=lambda c: c.need.peak)
        if least.need.peak <= (args.card - RESERVED) * GIB:
            raise HdlError(
                f"nothing fits {args.card:g} GiB without the host's memory: {least.weights} weights, all streamed and everything "
                f"recomputed, take {least.need.on_host(args.gpus) / GIB:.1f} GiB there, and --host is {args.host:g}"
            )
        raise HdlError(
            f"nothing fits {args.card:g} GiB: {least.weights} weights, all streamed and everything recomputed, take "
            f"{least.need.peak / GIB:.1f} GiB of {args.card - RESERVED:g}; fewer or smaller images, or a lower rank, need less"
        )
    if args.write:
        try:
            args.write.write_text(f"# {describe(args)}\n{tomli_w.dumps(as_preset(best))}", encoding="utf-8")
        except OSError as error:
            raise HdlError(f"--write {args.write}: cannot be written ({error.strerror})") from None
        print(f"\nwrote {args.write}: the fastest that fits")


def row(choice: Choice, gpus: int) -> str:
    need = choice.need
    parts = (need.weights, need.adapter, need.activations, need.workspace, need.peak)
    keep = mix(choice.strategy.keep) if choice.strategy else "does not fit, all recomputed:"
    stream = choice.strategy.stream if choice.strategy else "all"
    offload = choice.strategy.offload if choice.strategy else 0
    sizes = " | ".join(f"{part / GIB:.2f}" for part in parts)
    return (
        f"| {choice.weights} | {stream} | {offload} | {keep} | {sizes} | {need.on_host(gpus) / GIB:.1f} | "
        f"{choice.ms:.0f} |"
    )


def describe(args: argparse.Namespace) -> str:
    return (
        f"tools/plan.py --card {args.card:g} --size {args.size} --images {args.images} --text {args.text} --rank {args.rank} "
        f"--optimizer {args.optimizer} --gpus {args.gpus} --gpu {args.gpu}"
    )


def size(text: str) -> tuple[int, int]:
    """Height and width of WIDTHxHEIGHT; HdlError when they are not two multiples of 32."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) and int(part) % PATCH == 0 for part in parts):
        raise HdlError(f"--size {text}: expected WIDTHxHEIGHT, two multiples of {PATCH} such as 1024x1024")
    return int(parts[1]), int(parts[0])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card", type=positive, required=True, metavar="GIB", help="memory of the card")
    parser.add_argument("--size", default="1024x1024", help="of the images, WIDTHxHEIGHT (default 1024x1024)")
    parser.add_argument(
        "--images", type=count, default=1, help="packed into one forward on a GPU (default 1)"
    )
    parser.add_argument("--text", type=count, default=160, help="tokens of a caption (default 160)")
    parser.add_argument("--rank", type=count, default=32, help="of the LoRA on all linears (default 32)")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--gpus", type=count, default=1, help="that share the optimizer's state (default 1)")
    parser.add_argument(
        "--gpu", choices=list(GPUS), default="h100", help="whose rates the times are for (default h100)"
    )
    parser.add_argument(
        "--base", type=Path, help="checkpoint folder whose config.json to take (default: the real shapes)"
    )
    parser.add_argument(
        "--host", type=float, default=float("inf"), metavar="GIB",
        help="memory that the host has for streamed weights and offloaded activations (default: enough)",
    )  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the fastest that fits as a preset")
    return parser.parse_args()


def positive(text: str) -> float:
    value = float(text)
    if not RESERVED < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected more than {RESERVED:g} GiB, and a number")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


if __name__ == "__main__":
    command_line(main)
