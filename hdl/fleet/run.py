"""The rows of one part of the machine, one after another in the same processes, each through hdl.engine.loop.train.

    torchrun --nproc_per_node=N -m hdl.fleet.run OUT --of GPUS --until SECONDS [--tiny]

Importing, meeting over NCCL and compiling kernels take fresh processes longer than a row's steps. So a row only builds its
model, trains and lets everything go again. What it came to is in OUT/rows/ROW.json before the next one begins.

Unusual: a row that fails on all ranks alike is written down, and the same processes go on. Any other failure leaves
ranks that wait for one another, so that the processes end, and torchrun starts new ones (--max-restarts): these find that
the row was begun and has no result, write down that it failed, and go on with the next.
"""

import json
import math
import shutil
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.bench import scaling
from hdl.bench.command import machine
from hdl.bench.timing import give_back
from hdl.config import load_run
from hdl.engine.ending import last_duties
from hdl.engine.processes import Processes, process_group
from hdl.errors import HdlError, command_line
from hdl.fleet.rows import (
    EQUAL,
    ZERO3,
    Row,
    arguments,
    arguments_of_part,
    rows_of_all,
    rows_of_part,
    run_of,
    shards_of,
    size_of,
)
from hdl.kernels.attention import rows_for
from hdl.memory.plan import B16, GIB, GPUS, Gpu, Work, need
from hdl.o1.checkpoint import TOKEN_TABLE, expected_shapes
from hdl.o1.config import read_config

CURVES = {"loss": "losses", "speed/seconds_per_step": "seconds", "speed/images_per_second": "images",
          "speed/tokens_per_second": "tokens"}  # fmt: skip


def main() -> int:
    args = arguments_of_part(__doc__)
    with process_group() as processes:
        import hdl.engine.loop  # noqa: F401  # DeepSpeed takes seconds, in which the data may come to be there

        await_data(args.out, args.until)
        rows = (rows_of_all if processes.world == args.of else rows_of_part)(processes.world)
        return go(args.out, rows, processes, args.until, args.tiny)


def await_data(out: Path, until: float) -> None:
    """Return when the shards are there. HdlError where they do not come."""
    wanted = [shards_of(out, row.data) / "index.json" for row in rows_of_all(2)]
    while missing := [path for path in wanted if not path.exists()]:
        if time.time() > until:
            raise HdlError(f"{missing[0]}: not there in time; hdl.fleet.data writes it, see {out}/logs")
        time.sleep(0.1)


def go(out: Path, rows: list[Row], processes: Processes, until: float, tiny: bool) -> int:
    """Measure what has not been yet, as long as there is time; the process's exit status."""
    folder = out / "rows"
    for row in rows:
        # Rank 0's clock and disk decide, for all.
        todo = processes.gather(what_to_do(folder, row, rows, until) if processes.is_main else None)[0]
        if todo == "stop":
            break
        if todo == "pass over":
            continue
        begun = time.time()
        if processes.is_main:
            (folder / f"{row.name}.begun").touch()
            print(f"--- {row.name}", flush=True)
        found = attempt(out, row, processes, tiny)
        if processes.is_main:
            write(folder, row, found | {"wall": time.time() - begun})
            shutil.rmtree(run_of(out, row) / "checkpoints", ignore_errors=True)  # a GB each
        if "error" in found and leftover() > GIB:
            return 1  # a run that was broken off is kept by DeepSpeed's hooks
    return 0


def what_to_do(folder: Path, row: Row, rows: list[Row], until: float) -> str:
    if (folder / f"{row.name}.json").exists():
        return "pass over"
    if (folder / f"{row.name}.begun").exists():
        said = [path.read_text() for path in sorted(folder.glob(f"{row.name}.failed.*"))]
        write(folder, row, {"error": "; ".join(dict.fromkeys(said)) or "the processes were ended"})
        return "pass over"
    known = [json.loads(path.read_text()) for r in rows if (path := folder / f"{r.name}.json").exists()]
    expected = max((of["wall"] for of in known if "wall" in of), default=0.0)
    return "measure" if time.time() + expected < until else "stop"


def write(folder: Path, row: Row, found: dict[str, Any]) -> None:
    """Whole or not at all: this process may be killed."""
    partial = folder / f".{row.name}.partial"
    partial.write_text(json.dumps(asdict(row) | found, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / f"{row.name}.json")


def attempt(out: Path, row: Row, processes: Processes, tiny: bool) -> dict[str, Any]:
    """What a row came to, or how it failed where all ranks know of it; what else is raised ends the processes."""
    try:
        return measure(out, row, processes, tiny)
    except HdlError as error:
        if not error.on_all_ranks:
            note(out, row, processes, error)
            raise
        print(f"rank {processes.rank}: {row.name}: {error}", file=sys.stderr, flush=True)
        return {"error": str(error)}
    except Exception as error:
        note(out, row, processes, error)
        traceback.print_exc()
        raise


def note(out: Path, row: Row, processes: Processes, error: Exception) -> None:
    """For the processes that come after this one."""
    first = (str(error) or repr(error)).splitlines()[0]
    said = first if isinstance(error, HdlError) else f"{type(error).__name__}: {first}"
    (out / "rows" / f"{row.name}.failed.{processes.rank}").write_text(said)


def measure(out: Path, row: Row, processes: Processes, tiny: bool) -> dict[str, Any]:
    from hdl.engine.loop import train

    left = leftover()
    on_gpu = processes.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    status = train(load_run(arguments(row, out, tiny)), processes)
    if status:
        sys.exit(status)  # asked to stop
    # The engine is still there, for the sake of the run's last duties.
    mine = {
        "left": left,
        "resident": torch.cuda.memory_allocated(),
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    } if on_gpu else {}  # fmt: skip
    everyone = processes.gather(mine)
    found: dict[str, Any] = {}
    if processes.is_main:
        most = {name: max(of[name] for of in everyone) / GIB for name in mine}
        found = machine(processes.device) | curves_of(run_of(out, row)) | {"gib": most}
        found |= {"planned": planned(out, row, found, tiny)}
    return found


def leftover() -> int:
    """Bytes that stay on the GPU when the run before is let go, and the bounds that it set to the allocator with it."""
    last_duties.clear()  # they hold its engine, and have been done
    give_back()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.set_per_process_memory_fraction(1.0)
    return torch.cuda.memory_allocated()


def curves_of(run: Path) -> dict[str, list[float]]:
    """Of each step: its loss, seconds, and images and tokens over all ranks."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    found = {ours: [event.value for event in events.Scalars(name)] for name, ours in CURVES.items()}
    for rate in ("images", "tokens"):
        found[rate] = [round(of * seconds) for of, seconds in zip(found[rate], found["seconds"])]
    return found


def planned(out: Path, row: Row, found: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """What hdl/bench/scaling.py and hdl/memory/plan.py expected of the settings that the run took, for the work that its
    timed steps had: ms a step at best and at worst, GiB. Of DeepSpeed's ZeRO-3, the weights alone."""
    run = load_run([str(run_of(out, row) / "config.toml")])
    config = read_config(run.model.base / "config.json")
    if row.strategy == ZERO3:
        shapes = expected_shapes(config)
        numbers = sum(math.prod(shape) for name, shape in shapes.items() if name != TOKEN_TABLE)
        return {"weights": numbers * B16 / row.gpus / GIB}
    from hdl.engine.budget import strategy_of

    size, half = size_of(tiny), len(found["seconds"]) // 2
    images, tokens = (fmean(found[name][half:]) / row.gpus for name in ("images", "tokens"))
    text = size.text if row.data == EQUAL else fmean(size.texts)
    work = Work(rows_for(round(tokens)), round(tokens - images * text), round(tokens * tokens / images))
    strategy = strategy_of(run, config, row.gpus)
    rank, gpu = run.lora.rank, rates_of(found["device"])
    best, worst = scaling.step(config, rank, work, strategy, scaling.Cluster(row.gpus), gpu).ms
    needed = need(config, rank, work, strategy)
    return {
        "ms": [best, worst], "weights": needed.weights / GIB, "peak": needed.peak / GIB,
        "settings": {"weights": run.model.weights, "keep": run.model.keep, "stream": run.model.stream,
                     "offload": run.model.offload, "shard": run.model.shard, "optimizer": run.train.optimizer},
    }  # fmt: skip


def rates_of(device: str) -> Gpu:
    return next((gpu for name, gpu in GPUS.items() if name in device.lower()), GPUS["h100"])


if __name__ == "__main__":
    command_line(main)
