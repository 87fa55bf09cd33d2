"""Merge adapters into one, or into a checkpoint: see hdl/adapter/merge.py and into_checkpoint.py.

python tools/merge.py OUT --base CHECKPOINT --lora look.safetensors:0.8 --lora pim:0.6
python tools/merge.py OUT --base CHECKPOINT --lora a --lora b --method svd --rank 16 --format kohya
python tools/merge.py OUT.safetensors --base CHECKPOINT --lora a --into checkpoint --weights fp8
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch

from hdl.adapter.formats import WRITTEN, check_fits, read_adapter_file, with_metadata, write_adapter_file
from hdl.adapter.into_checkpoint import merge_into_checkpoint
from hdl.adapter.merge import Part, Truncated, merge_by_sum, merge_by_svd
from hdl.adapter.metadata import LICENSE
from hdl.adapter.names import place
from hdl.adapter.stack import parse_weighted, short_names
from hdl.errors import HdlError, command_line
from hdl.o1.checkpoint import open_checkpoint


def main() -> None:
    args = arguments()
    if (args.method == "svd") != (args.rank is not None):
        raise HdlError("--rank goes with --method svd, and that needs a --rank")
    if args.into == "checkpoint" and args.method == "svd":
        raise HdlError(
            "--into checkpoint adds the sum itself; merge by SVD into an adapter first if that is wanted"
        )
    loras = [parse_weighted(text) for text in args.lora]
    checkpoint = open_checkpoint(args.base, args.config_from)
    parts = []
    for name, lora in zip(short_names(lora.path for lora in loras), loras):
        adapter = read_adapter_file(lora.path)
        notice = check_fits(adapter, checkpoint, str(lora.path))
        if notice:
            print(f"note: {notice}")
        parts.append(Part(name, adapter, lora.weight))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.into == "checkpoint":
        verified = merge_into_checkpoint(args.out, checkpoint, parts, args.weights, device)
        print(
            f"{args.out}: {args.weights}; {len(verified.modules)} merged linears read again, off by at most "
            f"{verified.worst:.2f} of a rounding"
        )
        return
    if args.method == "svd":
        merged, kept = merge_by_svd(parts, args.rank, device)
        print(losses(kept))
    else:
        merged = merge_by_sum(parts)
    merged = with_metadata(merged, {LICENSE: args.license})
    write_adapter_file(merged, args.out, args.format, getattr(torch, args.dtype))
    ranks = {pair.rank for pair in merged.pairs.values()}
    print(f"{args.out}: {args.format}, {len(merged.pairs)} linears, rank {min(ranks)} to {max(ranks)}")


def losses(kept: dict[str, Truncated]) -> str:
    """A line a layer: the energy that is kept, and the relative error, mean and largest of its linears."""
    layers: dict[str, list[Truncated]] = {}
    for module, truncated in kept.items():
        layers.setdefault(place(module)[0], []).append(truncated)
    lines = [
        f"{layer:12} energy kept {fmean(t.energy for t in of):7.2%} (least {min(t.energy for t in of):7.2%})   "
        f"relative error {fmean(t.error for t in of):.3f} (largest {max(t.error for t in of):.3f})"
        for layer, of in sorted(layers.items(), key=lambda item: (len(item[0]), item[0]))
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge LoRAs of an O1 into one, or into a checkpoint.")
    parser.add_argument(
        "out",
        type=Path,
        help="a new folder (peft, published form) or .safetensors file (other formats, single file)",
    )
    parser.add_argument(
        "--lora", action="append", required=True, metavar="PATH[:WEIGHT]", help="may be given several times"
    )
    parser.add_argument("--base", type=Path, required=True, help="the checkpoint they belong to")
    parser.add_argument("--config-from", type=Path, help="folder with config.json, for a single-file base")
    parser.add_argument("--into", choices=("adapter", "checkpoint"), default="adapter")
    parser.add_argument("--method", choices=("sum", "svd"), default="sum", help="sum: exact, ranks add up")
    parser.add_argument("--rank", type=int, help="largest rank to keep, of svd")
    parser.add_argument("--format", choices=WRITTEN, default="peft", help="of the adapter")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the adapter"
    )
    parser.add_argument("--license", help="of the adapter, into its metadata")
    parser.add_argument(
        "--weights", choices=("bf16", "fp8"), default="bf16", help="of the checkpoint; fp8: e4m3"
    )
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
