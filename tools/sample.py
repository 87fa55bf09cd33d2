"""Draw pictures: python tools/sample.py OUT --base CHECKPOINT --prompt "a cat" [--lora ADAPTER]

Prompts x seeds down, adapters x strengths across: OUT/grid.png shows them all, OUT/000-seed0.png, … are the single
pictures, each with what it was drawn from in its metadata.
"""

import argparse
from pathlib import Path
from typing import get_args

import torch

from hdl.adapter.stack import parse_weighted, short_names
from hdl.errors import HdlError, command_line
from hdl.sample.album import Album, columns_of
from hdl.sample.draw import Studio
from hdl.sample.generate import SamplerSettings
from hdl.sample.path import Kernels, PathOptions, Weights
from hdl.sample.sizes import parse_size


def main() -> None:
    args = arguments()
    prompts = [*args.prompt, *(read_prompts(args.prompts_file) if args.prompts_file else [])]
    loras = [parse_weighted(text) for text in args.lora]
    named = dict(zip(short_names(lora.path for lora in loras), loras))
    width, height = parse_size(args.size)
    album = Album(
        args.out, prompts, range(args.seed, args.seed + args.seeds), columns_of(named, args.strengths, args.compare),
        width=width, height=height, references=args.reference,
    )  # fmt: skip
    settings = SamplerSettings(args.variant, args.steps, args.guidance_scale, args.shift)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = {name: lora.path for name, lora in named.items()}
    options = PathOptions(args.weights, args.stream, args.kernels)
    studio = Studio(args.base, device, config_from=args.config_from, adapters=paths, options=options)
    for notice in studio.notices:
        print(f"note: {notice}")
    drawings = studio.draw(album.wanted, settings, args.together)
    about = {
        "base": studio.checkpoint.fingerprint(),
        "loras": {name: str(path) for name, path in paths.items()},
        "weights": studio.path.weights,
    }
    album.save(drawings, settings, about)
    print(f"{len(drawings)} pictures and grid.png in {args.out}")


def read_prompts(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HdlError(f"--prompts-file {file}: not readable ({error})") from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw pictures with an O1 and LoRAs.")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument(
        "--base", type=Path, required=True, help="checkpoint folder or single .safetensors file"
    )
    parser.add_argument(
        "--config-from", type=Path, help="folder with config.json and tokenizer, for a single file"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:WEIGHT]",
        help="PEFT folder or .safetensors file; several are on together",
    )  # fmt: skip
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[1.0], metavar="X",
        help="a column each: what the LoRAs' weights are multiplied by",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true", help="also draw without LoRAs and, of several, with each alone"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="a prompt a line")
    parser.add_argument(
        "--reference", type=Path, action="append", default=[], metavar="IMAGE",
        help="draw from this image; several, in the order in which the prompt speaks of them",
    )  # fmt: skip
    parser.add_argument("--variant", choices=("full", "dev"), default="full")
    parser.add_argument(
        "--size", default="2048x2048", metavar="WxH",
        help="pixels, multiples of 32; or a ratio such as 16:9, for the nearest native size",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=50, help="of the full variant; dev takes its own 28")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first picture")
    parser.add_argument("--seeds", type=int, default=1, help="pictures a prompt, seed after seed")
    parser.add_argument("--together", type=int, default=1, help="pictures drawn in one packed run")
    parser.add_argument(
        "--weights", choices=get_args(Weights), default="full",
        help="form of the decoder's weights: full 16 bits a number on a GPU, fp8 8 (Ada and newer multiply in it), nf4 4",
    )  # fmt: skip
    parser.add_argument(
        "--stream", type=int, default=0, metavar="N",
        help="decoder layers whose weights stay in host memory and come to the GPU when needed; saves the memory of N - 2",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", choices=get_args(Kernels), default="auto",
        help="fused, or the plain modules; auto: fused on a GPU, and for fp8",
    )  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
