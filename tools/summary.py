"""Writes summary.html anew into the folders of runs, finished or not: see hdl/report/summary.py.

python tools/summary.py runs/kotonia
"""

import argparse
from pathlib import Path

from hdl.errors import command_line
from hdl.report.summary import write_summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run, its save.output"
    )
    for run in parser.parse_args().runs:
        print(write_summary(run))


if __name__ == "__main__":
    command_line(main)
