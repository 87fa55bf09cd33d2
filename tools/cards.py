"""Training in the memory of smaller cards, imitated on this GPU: what was predicted, and what it took.

    python tools/cards.py --json cards.json                       # all rows; each in a process of its own
    python tools/cards.py 24gb-2048x1 8gb-1024x1 --steps 5
    python tools/cards.py --random-settings 20 --seed 0           # the planner, held to settings of any kind
    python tools/cards.py --loading /scratch/o1                   # from disk to packed weights, with and without cache
    python tools/cards.py --tiny                                  # a tiny model, on the CPU

Random weights of the 8B model's shapes, random pixels. A row is planned for its card and trained through the code of a
run while the allocator may take 1 GiB less than the card has.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hdl.bench.cards import ROWS, Row, Setting, planned, random_settings, reference, standing
from hdl.bench.command import check_gpu, check_json
from hdl.errors import HdlError, command_line
from hdl.memory.host import available
from hdl.memory.plan import GIB, GPUS, Host
from hdl.o1.config import O1Config, read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG_8B = ROOT / "tests/o1/o1-8b-config.json"
CONFIG_TINY = ROOT / "tests/golden/o1-tiny/config.json"
ANSWER = "figures: "  # begins the line on which a process says what it measured
RANDOM_LARGEST, TINY_LARGEST = 1536, 128  # pixels
RANDOM_MEMORY, RANDOM_HOST = 60 * GIB, 24 * GIB
TIMEOUT = 900  # seconds, of one setting's process


def main() -> None:
    args = arguments()
    if args.child:
        answer(args)
        return
    check(args)
    if args.loading:
        data = loading(args)
    elif args.random_settings:
        data = ask(args, {"random": args.random_settings, "seed": args.seed})
        print(data["table"])
    else:
        data = rows(args)
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def config_of(args: argparse.Namespace) -> O1Config:
    return read_config(CONFIG_TINY if args.tiny else CONFIG_8B)


def rows(args: argparse.Namespace) -> dict[str, Any]:
    """Every row's settings, each in a new process, as a table while they come and as data."""
    from hdl.bench import card_report
    from hdl.bench.card_run import Figures

    config, gpu = config_of(args), GPUS["h100"]
    known: dict[Setting, Figures] = {}

    def figures(setting: Setting) -> Figures:
        if setting not in known:
            print(f"{setting.words()} ...", file=sys.stderr, flush=True)
            found = ask(args, {"setting": setting.as_data()})
            found.pop("step")
            known[setting] = Figures(**found)
        return known[setting]

    taken: dict[Row, card_report.Taken] = {}
    for row in [row for row in chosen_rows(args)]:
        setting = plan_of(args, row, config)
        bare = None if args.no_reference else figures(reference(setting))
        still = figures(standing(setting)) if setting.stream and not args.no_reference else None
        taken[row] = card_report.Taken(setting, figures(setting), bare, still)
        print(
            card_report.as_markdown({row: taken[row]}, config, gpu).split("\n\n")[0],
            file=sys.stderr,
            flush=True,
        )
    print(card_report.as_markdown(taken, config, gpu))
    return {row.name: card_report.as_data(one, config, gpu) for row, one in taken.items()}


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    names = args.rows or [row.name for row in ROWS]
    return [row for row in ROWS if row.name in names]


def plan_of(args: argparse.Namespace, row: Row, config: O1Config) -> Setting:
    host = Host(available()[0])
    if not args.tiny:
        return planned(row, config, args.rank, GPUS["h100"], host, spare=args.spare)
    # Between what the leanest and the most generous settings take, as if the card were that small.
    small = replace(row, side=row.side // 16)
    layers = config.num_hidden_layers
    ends = [
        Setting(small.side, small.side, small.images, args.rank, "full", (level,) * layers, stream=stream)
        for level, stream in (("input", layers), ("everything", 0))
    ]
    least, most = (end.need(config).peak for end in ends)
    return planned(small, config, args.rank, GPUS["h100"], host, memory=(2 * least + most) / 3)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    from hdl.bench import weights_from_disk as bench
    from hdl.bench.card_run import Figures

    base, cache = args.loading / "base", args.loading / "cache"
    config = config_of(args)
    ask(args, {"write": str(base)})
    disk = bench.disk_rate(base)
    print(f"written; disk, one thread: {disk / 1e9:.2f} GB/s", file=sys.stderr, flush=True)
    found: dict[bench.Load, tuple[Figures, int]] = {}
    side = 64 if args.tiny else 1024
    for load in bench.LOADS:
        if args.tiny and load.weights == "full":
            continue
        setting = Setting(side, side, 1, args.rank, load.weights, ("input",) * config.num_hidden_layers)
        bench.evict(args.loading)
        given = {"setting": setting.as_data(), "base": str(base), "cache": str(cache) if load.cache else None}
        figures = ask(args, given | {"steps": 0, "warmup": 0})
        figures.pop("step")
        found[load] = Figures(**figures), bench.read_bytes(load, base, cache)
        print(bench.as_row(load, *found[load]), file=sys.stderr, flush=True)  # as they come: all take minutes
    print(bench.as_markdown(found, disk))
    return {"disk": disk} | {
        load.name: figures.as_data() | {"read": size} for load, (figures, size) in found.items()
    }


def ask(args: argparse.Namespace, what: dict[str, Any]) -> dict[str, Any]:
    """What a new process answers; HdlError with the last it said when it does not."""
    what = {"tiny": args.tiny, "steps": args.steps, "warmup": args.warmup, "rank": args.rank} | what
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(what)]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise HdlError(f"no answer within {TIMEOUT} s: {what}") from None
    lines = [line for line in ran.stdout.splitlines() if line.startswith(ANSWER)]
    if ran.returncode or not lines:
        raise HdlError(f"a process of its own ended with {ran.returncode}: {what}\n{ran.stderr[-2000:]}")
    answered: dict[str, Any] = json.loads(lines[-1].removeprefix(ANSWER))
    return answered


def answer(args: argparse.Namespace) -> None:
    """In that process."""
    what = json.loads(args.child)
    print(ANSWER + json.dumps(answered(what)), flush=True)


def answered(what: dict[str, Any]) -> dict[str, Any]:
    import torch  # DeepSpeed takes seconds more

    from hdl.engine.processes import process_group

    with process_group() as processes, base_of(what) as base:
        from hdl.bench import card_report, card_run
        from hdl.bench.timing import give_back
        from hdl.bench.weights_from_disk import write_checkpoint
        from hdl.o1.checkpoint import open_checkpoint

        on_gpu = processes.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        if what.get("write"):
            config = CONFIG_TINY if what["tiny"] else CONFIG_8B
            write_checkpoint(config, Path(what["write"]), processes.device, torch.bfloat16)
            return {}
        checkpoint = open_checkpoint(base, random_init=not what.get("base"))
        cache = Path(what["cache"]) if what.get("cache") else None

        def measured(setting: Setting, left: int) -> card_run.Figures:
            return card_run.measure(
                setting, checkpoint, processes,
                dtype=dtype, steps=what["steps"], warmup=what["warmup"], cache=cache, left=left,
            )  # fmt: skip

        if "setting" in what:
            return measured(Setting.from_data(what["setting"]), 0).as_data()

        def reserved() -> int:
            give_back()
            return torch.cuda.memory_reserved(processes.device) if on_gpu else 0

        limits = (TINY_LARGEST, float("inf"), float("inf")) if what["tiny"] else (
            RANDOM_LARGEST, RANDOM_MEMORY, min(RANDOM_HOST, available()[0] / 2)
        )  # fmt: skip
        taken: list[card_report.Taken] = []
        stays: int | None = None  # what every process keeps once it has trained: the libraries' workspaces
        for setting in random_settings(what["random"], what["seed"], checkpoint.config, *limits):
            left = 0 if stays is None else max(reserved() - stays, 0)
            taken.append(card_report.Taken(setting, measured(setting, left)))
            stays = reserved() if stays is None else stays
            print(
                f"{setting.words()}: {taken[-1].figures.reserved}, left before {left}",
                file=sys.stderr,
                flush=True,
            )
        gpu = GPUS["h100"]
        return {
            "table": card_report.random_as_markdown(taken, checkpoint.config, gpu),
            "settings": [card_report.as_data(one, checkpoint.config, gpu) for one in taken],
        }


@contextmanager
def base_of(what: dict[str, Any]) -> Iterator[str]:
    """The folder of the checkpoint: given, or one with a config alone."""
    if what.get("base"):
        yield what["base"]
        return
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG_TINY if what["tiny"] else CONFIG_8B
        (Path(folder) / "config.json").write_text(config.read_text())
        yield folder


def check(args: argparse.Namespace) -> None:
    """HdlError for what cannot work, before anything is built."""
    unknown = [name for name in args.rows if name not in [row.name for row in ROWS]]
    if unknown:
        raise HdlError(f"no row {unknown[0]}; there are {', '.join(row.name for row in ROWS)}")
    tests: list[tuple[str, int, Callable[[int], bool]]] = [
        ("steps", args.steps, lambda n: n >= 1), ("warmup", args.warmup, lambda n: n >= 1),
        ("rank", args.rank, lambda n: n >= 1), ("random-settings", args.random_settings, lambda n: n >= 0),
    ]  # fmt: skip
    for name, value, fine in tests:
        if not fine(value):
            raise HdlError(f"--{name} {value}: too few")
    check_json(args.json)
    check_gpu(args.tiny)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help=f"any of {', '.join(row.name for row in ROWS)} (default: all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each setting (default 7)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before them (default 2)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA in the rows (default 32)")
    parser.add_argument("--spare", type=float, default=0.0, metavar="GIB",
                        help="plan rows for so much less than their card may take (default 0, as a run does)")  # fmt: skip
    parser.add_argument("--no-reference", action="store_true",
                        help="leave out what rows are compared to, for their memory alone")  # fmt: skip
    parser.add_argument("--random-settings", type=int, default=0, metavar="N",
                        help="in place of rows: N settings of any kind, one after another in one process")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of these")
    parser.add_argument("--loading", type=Path, metavar="FOLDER",
                        help="in place of rows: loading from a checkpoint that is written there (30 GB)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny images; runs on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
