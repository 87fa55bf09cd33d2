"""Predict how fast several GPUs and machines train, from a model of a step (docs/scaling.md).

    python tools/scaling.py                                   # 1024x1024 x 4 a GPU, as on H100s
    python tools/scaling.py --size 2048x2048 --images 1 --nvlink 150

Prints steps of one GPU, of 2 and 8 of a machine, and of four machines with 8 each over 400 and 100 Gb/s, with the frozen
weights whole on every GPU (ZeRO-2) and shared out over each machine's (model.shard).
"""

import argparse
from pathlib import Path

from hdl.bench import scaling
from hdl.errors import command_line
from hdl.memory.plan import GPUS, Work
from hdl.o1.config import read_config
from tools.plan import CONFIG_8B, count, size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1024x1024", help="of the images, WIDTHxHEIGHT (default 1024x1024)")
    parser.add_argument("--images", type=count, default=4, help="of a GPU's step (default 4)")
    parser.add_argument("--text", type=count, default=160, help="tokens of a caption (default 160)")
    parser.add_argument("--rank", type=count, default=32, help="of the LoRA on all linears (default 32)")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose rates (default h100)")
    parser.add_argument(
        "--nvlink", type=float, default=scaling.NVLINK, metavar="GB/S",
        help=f"a GPU's, in a collective within a machine (default {scaling.NVLINK:g})",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, help="checkpoint folder whose config.json to take")
    args = parser.parse_args()
    config = read_config(args.base / "config.json" if args.base else CONFIG_8B)
    work = Work.of_images(*size(args.size), args.images, args.text)
    clusters = scaling.clusters(args.nvlink)
    print("\n".join(scaling.table(config, args.rank, work, args.images, GPUS[args.gpu], clusters)))


if __name__ == "__main__":
    command_line(main)
