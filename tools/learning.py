"""Whether the fused path, with fp8 and nf4 weights too, learns what the plain one learns: tools/learning.py OUT

Trains style LoRAs on the small O1, for each path and seed, and prints the x0 error on pictures that no run
saw, and how far each path's loss curve is from the plain one's with the same seed.
"""

import argparse
import statistics
import warnings
from pathlib import Path

from hdl.errors import HdlError, command_line


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder for data and runs")
    parser.add_argument(
        "--paths",
        nargs="+",
        default=["plain", "regrouped", "fused", "fp8"],
        help="any of plain, regrouped (plain, with sums in another order), fused, fp8, and on a GPU nf4 "
        "(default: all but that)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each path (default 3)")
    parser.add_argument("--steps", type=int, default=500, help="of each run (default 500)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures a step (default 16)")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest learning rate (default 1e-3)")
    parser.add_argument(
        "--pictures", type=int, default=96, help="in the style, and as many plain (default 96)"
    )
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise HdlError(f"{args.out} is not empty; name a new folder")
    if args.batch_size % 2:
        raise HdlError(f"--batch-size {args.batch_size}: expected an even number, for path regrouped")
    from hdl.engine.processes import process_group

    with process_group() as processes:
        from hdl.bench.learning import PATHS, Learning, furthest

        unknown = [path for path in args.paths if path not in PATHS]
        if unknown:
            raise HdlError(f"--paths {' '.join(unknown)}: expected any of {', '.join(PATHS)}")
        learning = Learning(args.out, args.pictures, processes)
        runs = {
            (path, seed): learning.run(path, seed, args.steps, args.batch_size, args.lr)
            for path in args.paths
            for seed in range(args.seeds)
        }
    print(
        "\n| path | held-out x0 error, by seed | mean | spread | furthest from plain in 200 steps | in all |"
    )
    print("|---|---|---|---|---|---|")
    for path in args.paths:
        errors = [runs[path, seed].held_out for seed in range(args.seeds)]
        curves = [
            (runs[path, s].losses, runs["plain", s].losses)
            for s in range(args.seeds)
            if "plain" in args.paths
        ]
        early = max((furthest(a[:200], b[:200]) for a, b in curves), default=float("nan"))
        whole = max((furthest(a, b) for a, b in curves), default=float("nan"))
        print(
            f"| {path} | {' '.join(f'{e:.6f}' for e in errors)} | {statistics.mean(errors):.6f} | "
            f"{max(errors) - min(errors):.6f} | {early:.2%} | {whole:.2%} |"
        )


if __name__ == "__main__":
    command_line(main)
