"""Draw pictures: python tools/sample.py OUT --base CHECKPOINT --prompt "a cat" [--lora ADAPTER]

Writes OUT/000-seed0.png, … and OUT/prompts.txt. With a prompts file, one prompt a line.
"""

import argparse
from pathlib import Path

import torch

from hdl.errors import HdlError, command_line
from hdl.sample.draw import draw_prompts
from hdl.sample.generate import SamplerSettings


def main() -> None:
    args = arguments()
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            prompts += [
                line for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise HdlError(f"--prompts-file {args.prompts_file}: not readable ({error})") from None
    drawings = draw_prompts(
        args.base,
        prompts,
        SamplerSettings(args.variant, args.steps, args.guidance_scale, args.shift),
        adapter=args.lora,
        config_from=args.config_from,
        height=args.height,
        width=args.width,
        seeds=range(args.seed, args.seed + len(prompts)),
        together=args.together,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for i, drawing in enumerate(drawings):
        drawing.image.save(args.out / f"{i:03d}-seed{drawing.seed}.png")
    (args.out / "prompts.txt").write_text("".join(f"{d.prompt}\n" for d in drawings), encoding="utf-8")
    print(f"{len(drawings)} pictures in {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw pictures with an O1 and a LoRA.")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument(
        "--base", type=Path, required=True, help="checkpoint folder or single .safetensors file"
    )
    parser.add_argument(
        "--config-from", type=Path, help="folder with config.json and tokenizer, for a single file"
    )
    parser.add_argument("--lora", type=Path, help="folder of a PEFT adapter")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="a prompt a line")
    parser.add_argument("--variant", choices=("full", "dev"), default="full")
    parser.add_argument("--height", type=int, default=2048, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50, help="of the full variant; dev takes its own 28")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="picture i is drawn with seed + i")
    parser.add_argument("--together", type=int, default=1, help="pictures drawn in one packed run")
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
