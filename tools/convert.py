"""Say what an adapter is, and write it as another tool reads it: python tools/convert.py IN OUT --to kohya

IN is a PEFT folder or a .safetensors file of PEFT, ComfyUI, kohya/musubi or DiffSynth names; which, is seen from it.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

from hdl.adapter.formats import (
    WRITTEN,
    Adapter,
    check_fits,
    read_adapter_file,
    with_metadata,
    write_adapter_file,
)
from hdl.adapter.metadata import LICENSE, TITLE, TRIGGER
from hdl.errors import HdlError, command_line
from hdl.o1.checkpoint import open_checkpoint


def main() -> None:
    args = arguments()
    if not args.info and (args.out is None or args.to is None):
        raise HdlError("nothing to write: give OUT and --to, or --info to only look")
    adapter = read_adapter_file(args.adapter)
    print(describe(adapter))
    if args.base:
        print(
            check_fits(adapter, open_checkpoint(args.base, args.config_from), str(args.adapter))
            or "its base: yes"
        )
    if args.info:
        return
    adapter = with_metadata(adapter, {LICENSE: args.license, TRIGGER: args.trigger, TITLE: args.title})
    write_adapter_file(adapter, args.out, args.to, getattr(torch, args.dtype) if args.dtype else None)
    print(f"{args.to}: {args.out}")


def describe(adapter: Adapter) -> str:
    pairs = adapter.pairs.values()
    dtypes = Counter(str(w.dtype).removeprefix("torch.") for pair in pairs for w in (pair.a, pair.b))
    scaling = "alpha / sqrt(rank), rslora" if adapter.rslora else "alpha / rank"
    return "\n".join(
        [
            f"format    {adapter.format}",
            f"modules   {len(pairs)}",
            f"rank      {_counted(Counter(pair.rank for pair in pairs))}",
            f"alpha     {_counted(Counter(pair.alpha for pair in pairs))} (scaled by {scaling})",
            f"dtype     {_counted(dtypes)}",
            *(f"{name} = {value}" for name, value in sorted(adapter.metadata.items())),
        ]
    )


def _counted(values: Counter) -> str:
    if len(values) == 1:
        return f"{next(iter(values))}"
    return ", ".join(f"{value} ({count}x)" for value, count in values.most_common())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Say what a LoRA of an O1 is, and write it in another format."
    )
    parser.add_argument("adapter", type=Path, metavar="IN", help="PEFT folder or .safetensors file")
    parser.add_argument(
        "out", type=Path, metavar="OUT", nargs="?", help="a new folder (peft) or .safetensors file"
    )
    parser.add_argument("--to", choices=WRITTEN, help="what to write; kohya is also musubi-tuner's")
    parser.add_argument("--info", action="store_true", help="only print what IN is")
    parser.add_argument("--base", type=Path, help="checkpoint to hold the adapter against")
    parser.add_argument("--config-from", type=Path, help="folder with config.json, for a single-file base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are")
    parser.add_argument("--license", help="put into the file's metadata")
    parser.add_argument("--trigger", help="the phrase that calls for what it was taught; into the metadata")
    parser.add_argument("--title", help="into the metadata")
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
