"""How far the fused and the fp8 path are from float32 on random weights: tools/exactness.py [--layers N]

Prints, for PEFT's own bfloat16 modules (plain) and for hdl's fused paths, the relative error of x_pred and of
the adapter's gradients against a float32 run of the same weights and batch. With --rounding instead what rounding
only weights, inputs or gradients to e4m3 does to the bfloat16 path's numbers.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hdl.bench.cases import all_cases
from hdl.bench.exactness import distances
from hdl.bench.rounding import moved_by_rounding
from hdl.config import Lora
from hdl.data.samples import Sample
from hdl.errors import HdlError, command_line
from hdl.o1.checkpoint import Checkpoint, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = list(all_cases(tiny=False))
    parser.add_argument("--case", choices=cases, default="1024x1", help=f"one of {', '.join(cases)}")
    parser.add_argument("--layers", type=int, help="of the decoder (default: all)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.5], help="noise levels (default 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounding", action="store_true", help="fp8's roundings one by one")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny images; runs on a CPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise HdlError("no CUDA GPU here, and the 8B model needs one; --tiny takes a tiny model on the CPU")
    config = ROOT / ("tests/golden/o1-tiny/config.json" if args.tiny else "tests/o1/o1-8b-config.json")
    described = json.loads(config.read_text())
    if args.layers:
        described["text_config"]["num_hidden_layers"] = args.layers
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(described))
        checkpoint = open_checkpoint(folder, random_init=True)
    samples = all_cases(args.tiny)[args.case].samples(args.seed, checkpoint.config.hidden_size)
    lora = Lora(rank=args.rank, alpha=args.rank)
    measure = _print_rounding if args.rounding else _print_paths
    for sigma in args.sigma:
        measure(checkpoint, samples, lora, sigma, device, args.seed)


def _print_paths(
    checkpoint: Checkpoint, samples: Sequence[Sample], lora: Lora, sigma: float, *rest: Any
) -> None:
    print(f"\nsigma {sigma}\n")
    print(
        "| path | x_pred error | from plain | worst gradient error | lowest cosine | mean | lowest from plain | whose |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for d in distances(checkpoint, samples, lora, sigma, *rest):
        print(
            f"| {d.path} | {d.x_pred:.2e} | {d.x_pred_from_plain:.2e} | {d.worst_gradient_error:.2e} | "
            f"{d.lowest_cosine:.5f} | {d.mean_cosine:.5f} | {d.lowest_cosine_from_plain:.5f} | {d.lowest} |",
            flush=True,
        )


def _print_rounding(
    checkpoint: Checkpoint, samples: Sequence[Sample], lora: Lora, sigma: float, *rest: Any
) -> None:
    print(f"\nsigma {sigma}\n")
    print("| rounded to e4m3 | x_pred error | lowest cosine | mean | below 0.99 |")
    print("|---|---|---|---|---|")
    for m in moved_by_rounding(checkpoint, samples, lora, sigma, *rest):
        print(
            f"| {m.rounded} | {m.x_pred:.2e} | {m.lowest_cosine:.4f} | {m.mean_cosine:.4f} | {m.below} of {m.matrices} |",
            flush=True,
        )


if __name__ == "__main__":
    command_line(main)
