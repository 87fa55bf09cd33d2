"""All that is to be known of a machine with several GPUs, measured unattended within a time: launch/bench_8gpu.sh.

    python -m hdl.fleet OUT [--deadline 530] [--tiny]

Parts, each in processes of its own, in the order of their importance:

    data        random images into shards (hdl/fleet/data.py), while the next part starts up
    all         the rows of the table on all GPUs, in one process a GPU (hdl/fleet/run.py)
    1, 2        on one and two GPUs, for comparison, at the same time on GPUs of their own
    faults      a rank killed, the run continued, and continued on half of the GPUs (hdl/fleet/faults.py)
    rest        rows on all GPUs that there was no time for before

A part has until the time that those behind it need, then it is ended. What has been measured by then is in OUT/table.md
and OUT/results.json, which are written after every part.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hdl.errors import HdlError, command_line
from hdl.fleet.part import Part
from hdl.fleet.report import write_report
from hdl.fleet.rows import ROOT, all_rows, parts_of, rows_of_all

BESIDE, FAULTS = (
    0.19,
    0.27,
)  # of all the time: 100 and 143 s of 530 are kept for the parts 1 and 2, and for the faults
SHORTEST = 60.0  # seconds that processes need to start and measure anything
GRACE = 15.0  # seconds that a part may take longer than it was told to


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hdl.fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--deadline",
        type=float,
        default=530,
        metavar="SECONDS",
        help="after which all has ended (default 530)",
    )
    parser.add_argument("--tiny", action="store_true", help="the small O1, on CPUs, PROCESSES (2) of them")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what runs
    fleet = Fleet(args.out.resolve(), places(args.tiny), time.time() + args.deadline, args.tiny)
    print(fleet.measure())


def places(tiny: bool) -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them, or what stands for them. HdlError unless they are an even number."""
    name = "PROCESSES" if tiny else "GPUS"
    given = os.environ.get(name)
    if given is not None and not given.isdecimal():
        raise HdlError(f"{name} is {given!r}, expected a whole number; unset it for the default")
    visible = None if tiny else os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found = [place for place in visible.split(",") if place]
    else:
        found = [str(i) for i in range(int(given or (2 if tiny else count_gpus())))]
    if given and int(given) > len(found):
        raise HdlError(f"GPUS is {given}, and CUDA_VISIBLE_DEVICES leaves {len(found)}; set one of them anew")
    found = found[: int(given or len(found))]
    if len(found) < 2 or len(found) % 2:
        raise HdlError(
            f"{len(found)} GPU(s), expected an even number, half of which go on alone in the end; set {name} to one, or "
            "take --tiny for processes on the CPU"
        )
    return found


def count_gpus() -> int:
    """As launch/node.sh counts them; torch would take seconds to be imported."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU") for line in listed.stdout.splitlines())


class Fleet:
    def __init__(self, out: Path, places: list[str], end: float, tiny: bool) -> None:
        """end: in seconds since 1970. HdlError unless out holds no measurement yet."""
        if (out / "rows").exists():
            raise HdlError(f"{out} holds a measurement already; give a new folder")
        for folder in ("rows", "logs", "runs"):
            (out / folder).mkdir(parents=True)
        self.out, self.places, self.end, self.tiny = out, places, end, tiny
        self.began, self.gpus = time.time(), len(places)
        self.beside, self.faults = (share * (end - self.began) for share in (BESIDE, FAULTS))
        self.parts: list[Part] = []
        self.notes: list[str] = []

    def measure(self) -> str:
        """The table, in Markdown."""
        try:
            data = self.python("data", "hdl.fleet.data", self.out)
            until = self.end - self.faults - self.beside
            everything = self.rows("all", self.places, until)
            if not data.wait(until) or data.status:
                raise HdlError(f"no data to train on: {data.said()} ({data.log})")
            self.finish(until, everything)
            until = self.end - self.faults
            self.finish(until, *(self.rows(str(n), self.places[-n:] if n > 1 else self.places[:1], until)
                                 for n in parts_of(self.gpus)))  # fmt: skip
            self.finish(self.end, self.python("faults", "hdl.fleet.faults", self.out,
                                              "--of", str(self.gpus), "--until", str(self.end)))  # fmt: skip
            left = [
                row for row in rows_of_all(self.gpus) if not (self.out / "rows" / f"{row.name}.json").exists()
            ]
            if left and time.time() + SHORTEST < self.end:
                self.finish(self.end, self.rows("rest", self.places, self.end))
        finally:
            for part in self.parts:
                part.end()
            table = self.report()
        return table

    def finish(self, until: float, *parts: Part) -> None:
        """Wait for parts that run side by side, end what is left of them, write down what there is."""
        for part in parts:
            on_time = part.wait(min(until + GRACE, self.end))
            if not on_time:
                self.notes.append(f"part {part.name} was ended, its time was over")
            elif part.status:
                self.notes.append(f"part {part.name} ended with {part.status}: {part.said()}")
            part.end()
            print(f"{time.time() - self.began:4.0f} s: {part.name} done", file=sys.stderr, flush=True)
        self.report()

    def report(self) -> str:
        return write_report(self.out, self.gpus, time.time() - self.began, self.notes)

    def rows(self, name: str, places: list[str], until: float) -> Part:
        """torchrun over some of the GPUs."""
        torchrun = ["torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1",
                    f"--nproc-per-node={len(places)}", f"--max-restarts={len(all_rows(self.gpus))}"]  # fmt: skip
        own: list[str | Path] = [self.out, "--of", str(self.gpus), "--until", str(until)]
        return self.python(name, *torchrun, "-m", "hdl.fleet.run", *own, places=places)

    def python(self, name: str, *words: str | Path, places: list[str] | None = None) -> Part:
        """Start `python -m` with these words, seeing some of the GPUs, or all."""
        environment = {
            "CUDA_VISIBLE_DEVICES": "" if self.tiny else ",".join(places or self.places),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.gpus)),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        }
        if self.tiny:
            environment["DS_ACCELERATOR"] = "cpu"
        command = [sys.executable, "-m", *words, *(["--tiny"] if self.tiny else [])]
        part = Part(name, command, ROOT, self.out / "logs" / f"{name}.log", environment)
        self.parts.append(part)
        return part


if __name__ == "__main__":
    command_line(main)
