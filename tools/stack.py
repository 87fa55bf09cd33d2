"""Do these adapters get along? Overlap of their subspaces, and who changes whose pictures.

python tools/stack.py OUT --base CHECKPOINT --lora look --trigger "kotonia style" --lora pim --trigger pim \\
    --prompt "a big yellow fish on the left, at the sea"

Writes OUT/overlap.txt and overlap.png, and with prompts, which need a --base, changes.txt and pictures.png. Triggers
that are not given are taken from the adapters' metadata.
"""

import argparse
from pathlib import Path

import torch

from hdl.adapter.formats import read_adapter_file
from hdl.adapter.interplay import asking, change, disturbance, groups, label, table
from hdl.adapter.metadata import TRIGGER
from hdl.adapter.overlap import overlap_map, overlap_summary, overlap_table, overlaps
from hdl.adapter.stack import parse_weighted, short_names
from hdl.errors import HdlError, command_line
from hdl.sample.draw import Studio, Wanted
from hdl.sample.generate import SamplerSettings
from hdl.sample.grid import as_tensor, picture_grid


def main() -> None:
    args = arguments()
    loras = [parse_weighted(text) for text in args.lora]
    names = short_names(lora.path for lora in loras)
    weights = {name: lora.weight for name, lora in zip(names, loras)}
    adapters = {name: read_adapter_file(lora.path) for name, lora in zip(names, loras)}
    if len(names) < 2:
        raise HdlError("give two adapters or more: --lora A --lora B")
    if args.prompt and not args.base:
        raise HdlError("--prompt is drawn with a --base")
    if args.trigger and len(args.trigger) != len(names):
        raise HdlError(
            f"{len(args.trigger)} --trigger for {len(names)} --lora: give one each, in the same order"
        )
    triggers = dict(zip(names, args.trigger)) or {n: a.metadata.get(TRIGGER, "") for n, a in adapters.items()}

    args.out.mkdir(parents=True, exist_ok=True)
    by_pair = {
        f"{one}, {two}": overlaps(adapters[one], adapters[two])
        for one, two in (g for g in groups(names) if len(g) == 2)
    }
    for pair, found in by_pair.items():
        print(f"{pair}: overlap of {overlap_summary(found)}")
    tables = (f"{pair} (rows/columns, %)\n{overlap_table(found)}\n" for pair, found in by_pair.items())
    (args.out / "overlap.txt").write_text("\n".join(tables), encoding="utf-8")
    overlap_map(by_pair).save(args.out / "overlap.png")
    if not args.prompt:
        return

    unknown = [name for name, trigger in triggers.items() if not trigger]
    if unknown:
        raise HdlError(
            f"{', '.join(unknown)} names no trigger phrase in its metadata; give --trigger for every --lora"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    studio = Studio(
        args.base,
        device,
        config_from=args.config_from,
        adapters={n: lora.path for n, lora in zip(names, loras)},
    )
    for notice in studio.notices:
        print(f"note: {notice}")
    cells = [(on, asked) for on in groups(names) for asked in groups(names)]
    wanted = [
        Wanted(
            asking(prompt, asked, triggers),
            args.seed + i,
            args.height,
            args.width,
            {n: weights[n] for n in on},
        )
        for on, asked in cells
        for i, prompt in enumerate(args.prompt)
    ]
    settings = SamplerSettings(args.variant, args.steps, args.guidance_scale, args.shift)
    drawn = [as_tensor(drawing.image) for drawing in studio.draw(wanted, settings, args.together)]
    count = len(args.prompt)
    pictures = {cell: drawn[i * count : (i + 1) * count] for i, cell in enumerate(cells)}
    text = (
        "mean absolute change of a pixel, 0 to 255, against the same without adapters\n"
        + table(change(pictures), "on \\ asked")
        + "\n\nhow much the second adapter, not asked for, changes the pictures of the first\n"
        + table({((whose,), (by,)): v for (whose, by), v in disturbance(pictures).items()}, "whose \\ by")
    )
    print(text)
    (args.out / "changes.txt").write_text(text + "\n", encoding="utf-8")
    rows = [[pictures[on, asked][0] for asked in groups(names)] for on in groups(names)]
    labels = [f"adapters on: {label(on)}" for on in groups(names)]
    picture_grid(rows, [f"asked: {label(asked)}" for asked in groups(names)], labels).save(
        args.out / "pictures.png"
    )
    print(f"overlap.png, pictures.png and the numbers are in {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for tables and pictures")
    parser.add_argument("--lora", action="append", required=True, metavar="PATH[:WEIGHT]", help="two or more")
    parser.add_argument("--trigger", action="append", default=[], help="one for every --lora, in their order")
    parser.add_argument(
        "--prompt", action="append", default=[], help="without any, only subspaces are compared"
    )
    parser.add_argument("--base", type=Path, help="checkpoint folder or single .safetensors file")
    parser.add_argument(
        "--config-from", type=Path, help="folder with config.json and tokenizer, for a single file"
    )
    parser.add_argument("--variant", choices=("full", "dev"), default="full")
    parser.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50, help="of the full variant; dev takes its own 28")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="prompt i is drawn with seed + i")
    parser.add_argument("--together", type=int, default=1, help="pictures drawn in one packed run")
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
