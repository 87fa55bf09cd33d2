"""Says how much pictures are in kotonia style: a score from 0 to 1 each, and the share that counts as styled.

python tools/style_score.py runs/quickstart/with_trigger
"""

import argparse
from pathlib import Path

from hdl.errors import command_line
from hdl.mini.style import THRESHOLD
from hdl.mini.style_set import score_files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    scores = score_files(parser.parse_args().images)
    for file, score in scores.items():
        print(f"{score:.3f}  {file}")
    styled = sum(score >= THRESHOLD for score in scores.values())
    print(f"{styled} of {len(scores)} styled ({styled / len(scores):.0%}; a score of {THRESHOLD} or more)")


if __name__ == "__main__":
    command_line(main)
