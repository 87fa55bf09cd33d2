"""Makes the bundled small O1: draws scenes, trains on them, writes a checkpoint and its curve.

    python tools/make_mini.py hdl/mini/o1-mini                # on a GPU, about eight minutes
    python tools/make_mini.py hdl/mini/o1-mini --draw 32      # only draws prompts with a checkpoint that is there

The second form writes prompts.png and prompts.txt into the folder.
"""

import argparse
from pathlib import Path

import torch

from hdl.errors import HdlError, command_line
from hdl.mini.pretrain import Recipe, pretrain
from hdl.mini.save import mini_config
from hdl.mini.show import draw_held_out, plot_curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the checkpoint's folder")
    parser.add_argument(
        "--steps", type=int, default=60_000, help="train so many steps at most (default 60000)"
    )
    parser.add_argument("--minutes", type=float, default=6.7, help="train so long at most (default 6.7)")
    parser.add_argument("--batch", type=int, default=256, help="pictures a step (default 256)")
    parser.add_argument(
        "--scenes", type=int, default=300_000, help="pictures drawn beforehand (default 300000)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", type=int, metavar="N", help="train nothing; draw N held-out prompts")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale for --draw (default 1)")
    args = parser.parse_args()
    if args.draw:
        prompts = draw_held_out(args.out, args.out / "prompts.png", args.draw, args.guidance, 50, args.device)
        (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return
    if (args.out / "model.safetensors").exists():
        raise HdlError(f"{args.out} holds a model already; name a new folder, or delete that one first")
    recipe = Recipe(args.steps, args.minutes, args.batch, args.scenes)
    pretrain(args.out, mini_config(), recipe, args.device)
    plot_curve(args.out / "curve.csv", args.out / "curve.png")


if __name__ == "__main__":
    command_line(main)
