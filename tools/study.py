"""Reruns the studies behind docs/recipes.md on the small O1: what each option does to a look and to all else.

    python tools/study.py runs/studies                    # every study, from seeds 0, 1 and 2
    python tools/study.py runs/studies look content --seeds 0 1 --steps 200
    python tools/study.py runs/studies --at-once 8        # on one GPU

A table a study is printed and kept as OUT/STUDY/table.md, with a grid of pictures for each run. Broken off, it goes on
where it was. What it measures: hdl/study/measures.py.
"""

import argparse
import os
import warnings
from pathlib import Path

from hdl.errors import HdlError, command_line

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for runs, pictures and tables")
    parser.add_argument("studies", nargs="*", help="which (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of every run (default 400)")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--count", type=int, default=48, help="prompts to judge by (default 48)")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side (default 1)")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.count, args.at_once) < 1:
        raise HdlError("--steps, --batch-size, --count and --at-once: expected at least 1 each")
    from hdl.engine.processes import process_group  # torch and DeepSpeed take seconds to import
    from hdl.study.run import STUDIES, Setting, Study
    from hdl.study.side_by_side import run_side_by_side

    unknown = [name for name in args.studies if name not in STUDIES]
    if unknown:
        raise HdlError(f"no study is called {unknown[0]!r}; there are {', '.join(STUDIES)}")
    names, setting = args.studies or list(STUDIES), Setting(args.steps, args.batch_size, args.count)
    if args.at_once > 1:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise HdlError("--at-once is for one process that starts others; leave it out under torchrun")
        for table in run_side_by_side(args.out, names, setting, args.seeds, args.at_once):
            print(table, flush=True)
        return
    with process_group() as processes:
        for name in names:
            print(Study(args.out, name, setting, processes).run(args.seeds), flush=True)


if __name__ == "__main__":
    command_line(main)
