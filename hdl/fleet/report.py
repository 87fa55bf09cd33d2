"""What was measured of a machine with several GPUs, as one table in Markdown and as plain data.

It is written again after every part of the measurement, from the files that the parts have left in OUT.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from hdl.fleet.rows import EQUAL, FP8, FULL, MIXED, PLANNED, SHARDED, ZERO2, Row, all_rows

HEAD = (
    "GPUs", "strategy", "weights", "data", "images/s", "tokens/s", "step ms", "min to max", "allocated GiB", "reserved GiB",
    "at rest GiB", "weights GiB", "of 1 GPU", "of ZeRO-2", "predicted ms", "planned GiB",
)  # fmt: skip
SCALING_WANTED, SHARDED_WANTED = 0.96, 0.82
NOTES = """\
step ms: the median of the last half of the steps, their fastest and slowest. images/s go with the median, those of mixed
data and all tokens/s with the sums. GiB: peaks of the allocator, the most that a rank had, loading included; at
rest: what it has when the last step is over; weights: the frozen ones among it, as hdl/memory/plan.py counts them. of
1 GPU: images/s of each GPU against ZeRO-2 on one with such weights; of ZeRO-2: against ZeRO-2 on as many GPUs. predicted
ms: hdl/bench/scaling.py, fitted to H100s and H200s; planned GiB: hdl/memory/plan.py."""


@dataclass(frozen=True)
class Result:
    """A row and what it came to: data is None where it was not reached, and has `error` where it failed."""

    row: Row
    data: dict[str, Any] | None

    @property
    def state(self) -> str:
        if self.data is None:
            return "not reached"
        return "failed" if "error" in self.data else "measured"

    @property
    def measured(self) -> bool:
        return self.state == "measured"

    def half(self, name: str) -> list[float]:
        """Of the last half of the steps."""
        assert self.data
        values: list[float] = self.data[name]
        return values[len(values) // 2 :]

    @property
    def seconds(self) -> float:
        return median(self.half("seconds"))

    @property
    def images(self) -> float:
        """A second."""
        if self.row.data == MIXED:
            return sum(self.half("images")) / sum(self.half("seconds"))
        return median(self.half("images")) / self.seconds

    @property
    def tokens(self) -> float:
        """A second."""
        return sum(self.half("tokens")) / sum(self.half("seconds"))

    @property
    def weights(self) -> str:
        """The form that it had, FULL or FP8, for comparisons; what a plan chose counts by its kind."""
        if self.row.weights != PLANNED or not self.data:
            return self.row.weights
        chosen: str = self.data["planned"]["settings"]["weights"]
        return FP8 if chosen.startswith(FP8) else chosen


@dataclass(frozen=True)
class Fleet:
    """gpus: of the machine."""

    gpus: int
    results: dict[Row, Result]

    def found(self, gpus: int, strategy: str, weights: str, data: str = EQUAL) -> Result | None:
        result = self.results.get(Row(gpus, strategy, weights, data))
        return result if result and result.measured else None

    def of_one(self, result: Result) -> float | None:
        """A GPU's share of the images/s against those of one GPU alone."""
        one = self.found(1, ZERO2, result.weights, result.row.data)
        return result.images / result.row.gpus / one.images if one else None

    def of_zero2(self, result: Result) -> float | None:
        other = self.found(result.row.gpus, ZERO2, result.weights, result.row.data)
        if other is None or other is result:
            return None
        return result.tokens / other.tokens if result.row.data == MIXED else result.images / other.images

    @cached_property
    def wanted(self) -> list[dict[str, Any]]:
        """What was to be reached, and what was, None where it was not measured."""
        found = []
        for weights in (FULL, FP8):
            whole, shared = (self.found(self.gpus, strategy, weights) for strategy in (ZERO2, SHARDED))
            found += [
                {
                    "what": f"ZeRO-2 on {self.gpus} GPUs against {self.gpus} x 1 GPU, {weights}",
                    "wanted": SCALING_WANTED,
                    "found": self.of_one(whole) if whole else None,
                },
                {
                    "what": f"sharded against ZeRO-2 on {self.gpus} GPUs, {weights}",
                    "wanted": SHARDED_WANTED,
                    "found": self.of_zero2(shared) if shared else None,
                },
            ]
        return found

    def apart(self) -> list[str]:
        """How far the losses of sharded runs are from those of ZeRO-2 on the same samples."""
        lines = []
        for row, result in self.results.items():
            other = self.found(row.gpus, ZERO2, row.weights, row.data)
            if row.strategy == SHARDED and result.measured and other:
                assert result.data and other.data
                pairs = zip(result.data["losses"], other.data["losses"], strict=True)
                most = max(abs(a - b) / abs(b) for a, b in pairs)
                lines.append(
                    f"losses, sharded against ZeRO-2, {row.gpus} GPUs, {row.weights}, {row.data}: {most:.2e} apart at most"
                )
        return lines


def write_report(out: Path, gpus: int, seconds: float, notes: list[str]) -> str:
    """table.md and results.json in OUT; the table. seconds: that the measurement has taken. notes: on parts of it."""
    results = {}
    for row in all_rows(gpus):
        file = out / "rows" / f"{row.name}.json"
        data = json.loads(file.read_text()) if file.exists() else None
        if data is None and file.with_suffix(".begun").exists():
            data = {"error": "was not through when its time was over"}
        results[row] = Result(row, data)
    fleet = Fleet(gpus, results)
    faults = json.loads((out / "faults.json").read_text()) if (out / "faults.json").exists() else []
    table = as_markdown(fleet, faults, seconds, notes)
    (out / "table.md").write_text(table, encoding="utf-8")
    data = as_data(fleet, faults, seconds, notes)
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return table


def as_markdown(fleet: Fleet, faults: list[dict[str, Any]], seconds: float, notes: list[str]) -> str:
    results = list(fleet.results.values())
    first = next(
        (r.data for r in results if r.measured and r.data), {"device": "unknown", "torch": "unknown"}
    )
    lines = [
        f"{fleet.gpus} x {first['device']}, torch {first['torch']}; measured in {seconds:.0f} s",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
        *(f"| {' | '.join(cells(fleet, result))} |" for result in results),
        "",
        NOTES,
        "",
        *(wanted_line(one) for one in fleet.wanted),
        "",
        *(fault_line(one) for one in faults or [{"what": "faults", "why": "not reached"}]),
        "",
    ]
    lines += fleet.apart()
    for result in results:
        if result.state == "failed" and result.data:
            lines.append(f"failed: {result.row.name}: {result.data['error']}")
    left = max((r.data["gib"].get("left", 0.0) for r in results if r.measured and r.data), default=0.0)
    if left > 0.1:
        lines.append(f"up to {left:.2f} GiB were still allocated when a row began, and are in its peaks")
    return "\n".join([*lines, *notes]) + "\n"


def cells(fleet: Fleet, result: Result) -> list[str]:
    row, data = result.row, result.data
    name = [str(row.gpus), row.strategy, row.weights, row.data]
    if not result.measured or data is None:
        return [*name, result.state, *["-"] * (len(HEAD) - len(name) - 1)]
    if row.weights == PLANNED:
        name[2] = data["planned"]["settings"]["weights"]
    steps, gib, plan = result.half("seconds"), data["gib"], data["planned"]
    predicted = dict.fromkeys(f"{ms:.0f}" for ms in plan.get("ms", []))
    return [
        *name,
        f"{result.images:.2f}",
        f"{result.tokens:,.0f}",
        f"{1e3 * result.seconds:.1f}",
        f"{1e3 * min(steps):.1f} to {1e3 * max(steps):.1f}",
        *(f"{gib[of]:.2f}" if gib else "-" for of in ("allocated", "reserved", "resident")),
        f"{plan['weights']:.2f}",
        percent(fleet.of_one(result) if row.gpus > 1 else None),
        percent(fleet.of_zero2(result)),
        " to ".join(predicted) or "-",
        f"{plan['peak']:.2f}" if "peak" in plan else "-",
    ]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def wanted_line(one: dict[str, Any]) -> str:
    found, least = one["found"], one["wanted"]
    if found is None:
        return f"{one['what']}: not measured; wanted at least {100 * least:.0f} %"
    verdict = "met" if found >= least else "missed"
    return f"{one['what']}: {percent(found)}, wanted at least {100 * least:.0f} %: {verdict}"


def fault_line(one: dict[str, Any]) -> str:
    if one["why"]:
        return f"{one['what']}: not ok: {one['why']}"
    saves = ", ".join(f"{stall:.3f}" for stall in one["stalls"])
    return (
        f"{one['what']}: ok; went on after step {one['resumed']}, {one['seconds']:.1f} s until the first step was through; "
        f"saves kept training waiting for {saves or 'an unknown time'} s"
    )


def as_data(fleet: Fleet, faults: list[dict[str, Any]], seconds: float, notes: list[str]) -> dict[str, Any]:
    rows = []
    for row, result in fleet.results.items():
        derived: dict[str, Any] = {"state": result.state}
        if result.measured:
            derived |= {
                "images_per_second": result.images, "tokens_per_second": result.tokens, "step_seconds": result.seconds,
                "of_one_gpu": fleet.of_one(result), "of_zero2": fleet.of_zero2(result),
            }  # fmt: skip
        rows.append({"name": row.name, **vars(row), **derived, "data": result.data})
    return {
        "gpus": fleet.gpus, "seconds": seconds, "rows": rows, "wanted": fleet.wanted, "faults": faults, "notes": notes,
    }  # fmt: skip
