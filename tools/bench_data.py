"""Speed of everything between a folder of pictures and a batch, against what one writes without a trainer.

    python tools/bench_data.py prepare           # camera JPEGs into shards, beside a loop of Pillow alone
    python tools/bench_data.py index             # 100,000 small pictures, new and again, beside the same loop
    python tools/bench_data.py loader            # shards into batches, beside a DataLoader with Pillow
    python tools/bench_data.py stream            # shards over HTTP that fails, beside the same without faults

Everything is made here from a seed, and both sides run on this machine in the same call. Rates are told by the clock
and by the processor time spent; the latter holds on a machine that others use, too. --json FILE writes every figure.
"""

import argparse
import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdl.errors import HdlError, command_line

# Nothing heavy is imported here: the processes that decode import this file, as they do what starts a real run.
WHATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # what: the module and name of its measurement, and its arguments with --tiny
    "prepare": (
        "prepare_speed",
        "measure",
        {"images": 4, "width": 640, "height": 480, "area": 256, "workers": 0},
    ),
    "index": ("prepare_speed", "measure_many", {"images": 200, "workers": 0}),
    "loader": (
        "loading",
        "measure",
        {"pictures": 4, "side": 256, "area": 128, "images": 16, "steps": 4, "step_seconds": 0.02},
    ),
    "stream": (
        "streaming_data",
        "measure",
        {"shards": 12, "samples": 3, "side": 2, "rate": None, "window": 3, "cached_shards": 8, "stall": 0.3},
    ),
}

# name: unit and meaning; which measurement takes it is read off its signature.
OPTIONS: dict[str, tuple[type, str]] = {
    "images": (int, "prepared, or loaded each way"),
    "workers": (int, "processes that decode"),
    "shards": (int, "of an epoch"),
    "rate": (float, "bytes a second of the server; 0: as fast as it can"),
    "seed": (int, "of what is made, and of the faults"),
}


def main() -> None:
    args = arguments()
    if args.json and not args.json.resolve().parent.is_dir():
        raise HdlError(f"--json {args.json}: no folder {args.json.parent}")
    module, name, tiny = WHATS[args.what]
    measure = getattr(importlib.import_module(f"hdl.bench.{module}"), name)
    said = {option: getattr(args, option) for option in OPTIONS}
    given = (tiny if args.tiny else {}) | options_of(args.what, measure, said)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder) / "bench", **given)
    about = {"what": args.what, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    print("\n".join(f"{name:>28}  {shown(value)}" for name, value in (about | found).items()))
    if args.json:
        args.json.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


def options_of(what: str, measure: Callable[..., object], said: dict[str, Any]) -> dict[str, Any]:
    """What was said of a measurement's arguments; HdlError where it has no such one."""
    known = inspect.signature(measure).parameters
    given = {name: value for name, value in said.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise HdlError(f"--{name}: {what} has no such option")
        if value < 0 or (value == 0 and name in ("images", "shards")):
            raise HdlError(f"--{name} {value}: expected more than that")
    return given | ({"rate": None} if given.get("rate") == 0 else {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(WHATS))
    for name, (kind, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=meaning)
    parser.add_argument(
        "--folder", type=Path, help="where the files are made and removed again (default: the system's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for tests")
    return parser.parse_args()


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} of them"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    command_line(main)
