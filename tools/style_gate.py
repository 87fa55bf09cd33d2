"""Draws held-out prompts with and without the trigger phrase, and says how many came out in kotonia style.

python tools/style_gate.py runs/quickstart/gate --base hdl/mini/o1-mini --lora runs/quickstart/run/adapter
"""

import argparse
from pathlib import Path

import torch

from hdl.errors import command_line
from hdl.mini.gate import measure_gate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the pictures and their grid")
    parser.add_argument("--base", type=Path, required=True, help="checkpoint of a small O1")
    parser.add_argument("--lora", type=Path, help="folder of a PEFT adapter (default: the base alone)")
    parser.add_argument("--count", type=int, default=24, help="prompts, each drawn both ways (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other prompts and noise")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate = measure_gate(args.out, args.base, args.lora, args.count, args.seed, device)
    print(
        f"in the style: {gate.with_trigger:.0%} of {args.count} pictures with the trigger, "
        f"{gate.without_trigger:.0%} without; pictures side by side: {args.out / 'gate.png'}"
    )


if __name__ == "__main__":
    command_line(main)
