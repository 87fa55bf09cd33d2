"""Draws a style set: pictures in one look with a trigger phrase, and plain ones without it.

    python tools/style_set.py data/kotonia --styled 96 --plain 96

writes .png files, a .txt caption beside each, and styles.json: what tools/prepare.py reads.
"""

import argparse
from pathlib import Path

from hdl.errors import command_line
from hdl.mini.style import TRIGGER
from hdl.mini.style_set import write_style_set


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--styled", type=int, default=96, help=f'pictures in the look of "{TRIGGER}" (default 96)'
    )
    parser.add_argument("--plain", type=int, default=96, help="pictures in other looks (default 96)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default 0)")
    args = parser.parse_args()
    write_style_set(args.out, args.styled, args.plain, args.seed)
    print(
        f"{args.out}: {args.styled} pictures in the look of “{TRIGGER}”, {args.plain} plain ones, styles.json"
    )


if __name__ == "__main__":
    command_line(main)
