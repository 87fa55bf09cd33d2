"""What launch/bench_8gpu.sh makes of its rows: when one is begun, what is said of it, and that it leaves nothing behind.
The whole script: tests/launch/test_bench_8gpu.py."""

import gc
import json
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hdl.config import load_run
from hdl.engine.ending import last_duties
from hdl.fleet.part import Part, processes_of
from hdl.fleet.report import write_report
from hdl.fleet.rows import (
    EQUAL,
    FP8,
    FULL,
    MIXED,
    PLANNED,
    PRESET,
    SHARDED,
    ZERO2,
    Row,
    all_rows,
    arguments,
)
from hdl.fleet.run import leftover, what_to_do
from tests.engine.conftest import photos, shards  # noqa: F401  # fixtures

if TYPE_CHECKING:
    from hdl.engine.processes import Processes


def test_every_part_has_rows_of_its_own() -> None:
    rows = all_rows(4)
    assert len(set(rows)) == len(rows) == len({row.name for row in rows}) == 10 + 2 + 4
    assert len(all_rows(2)) == 10 + 2  # two GPUs are all, and not measured twice


@pytest.mark.parametrize("row", all_rows(4), ids=lambda row: row.name)
def test_rows_are_runs(row: Row, tmp_path: Path) -> None:
    run = load_run(arguments(row, tmp_path, tiny=False))
    images = run.train.batch_packs if row.data == MIXED else run.train.batch_size
    assert images == row.gpus * (1 if row.data == MIXED else 4)
    assert run.model.random_init and run.model.dtype == "bfloat16"
    assert run.model.shard == (36 if row.strategy == SHARDED else 0)
    assert (run.model.card, run.model.memory) == ((24, "auto") if row.strategy == PRESET else (None, "set"))
    assert run.model.weights == (FP8 if row.weights == FP8 else "full")


def test_a_row_that_ended_its_processes_is_not_tried_again(tmp_path: Path) -> None:
    first, second, third = rows = [Row(2, ZERO2, FULL), Row(2, SHARDED, FULL), Row(2, ZERO2, FP8)]
    later = time.time() + 50
    assert what_to_do(tmp_path, first, rows, later) == "measure"
    (tmp_path / f"{first.name}.json").write_text(json.dumps({"wall": 10.0}))
    assert what_to_do(tmp_path, first, rows, later) == "pass over"
    (tmp_path / f"{second.name}.begun").touch()
    for rank, said in enumerate(["out of memory", "rank 0 is gone", "out of memory"]):
        (tmp_path / f"{second.name}.failed.{rank}").write_text(said)
    assert what_to_do(tmp_path, second, rows, later) == "pass over"
    told = json.loads((tmp_path / f"{second.name}.json").read_text())
    assert told["error"] == "out of memory; rank 0 is gone" and told["strategy"] == SHARDED

    assert what_to_do(tmp_path, third, rows, later) == "measure"
    (tmp_path / f"{first.name}.json").write_text(json.dumps({"wall": 60.0}))
    assert what_to_do(tmp_path, third, rows, later) == "stop"


def measured(seconds: float, images: int, weights: str = FULL) -> dict[str, Any]:
    """Of 4 steps of which the first two, which do not count, are ten times as slow."""
    return {
        "device": "GPU", "torch": "2", "seconds": [10 * seconds, 10 * seconds, seconds, seconds], "images": [images] * 4,
        "tokens": [1000 * images] * 4, "losses": [1.0, 1.0, 1.0, 1.0],
        "gib": {"left": 0.0, "resident": 15.0, "allocated": 30.0, "reserved": 38.5},
        "planned": {"ms": [270.0, 281.0], "weights": 14.0, "peak": 37.0, "settings": {"weights": weights}},
    }  # fmt: skip


def test_the_table(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()

    def put(row: Row, data: dict[str, Any]) -> None:
        (tmp_path / "rows" / f"{row.name}.json").write_text(json.dumps(data))

    put(Row(1, ZERO2, FULL), measured(0.25, 4))
    put(Row(4, ZERO2, FULL), measured(0.26, 16))
    put(Row(4, SHARDED, FULL), measured(0.325, 16) | {"losses": [1.0, 1.0, 1.02, 1.0]})
    put(Row(1, ZERO2, FP8), measured(0.2, 4))
    put(Row(4, ZERO2, FP8), measured(0.25, 16))
    put(Row(4, PRESET, PLANNED), measured(0.5, 16, "fp8_once"))
    put(Row(4, SHARDED, FP8), {"error": "out of memory"})
    (tmp_path / "rows" / f"{Row(4, SHARDED, FULL, MIXED).name}.begun").touch()
    fault = {"what": "a rank killed", "why": None, "seconds": 12.34, "resumed": 20, "stalls": [0.5]}
    (tmp_path / "faults.json").write_text(json.dumps([fault, fault | {"what": "halved", "why": "no"}]))
    table = write_report(tmp_path, 4, 100.0, ["part 1 was ended"])
    assert (tmp_path / "table.md").read_text() == table
    lines = table.splitlines()

    def cells(*start: str) -> list[str]:
        (line,) = [line for line in lines if line.startswith(f"| {' | '.join(start)} |")]
        return line.strip("| ").split(" | ")[4:]

    whole = ["61.54", "61,538", "260.0", "260.0 to 260.0", "30.00", "38.50", "15.00", "14.00", "96.2 %", "-"]
    assert cells("4", ZERO2, FULL, EQUAL) == [*whole, "270 to 281", "37.00"]
    assert cells("4", SHARDED, FULL, EQUAL)[8:10] == ["76.9 %", "80.0 %"]
    assert cells("4", PRESET, "fp8_once", EQUAL)[8:10] == ["40.0 %", "50.0 %"]
    assert cells("4", SHARDED, FP8, EQUAL)[0] == cells("4", SHARDED, FULL, MIXED)[0] == "failed"
    assert cells("4", ZERO2, FULL, MIXED)[0] == "not reached"
    for line in (
        "ZeRO-2 on 4 GPUs against 4 x 1 GPU, full: 96.2 %, wanted at least 96 %: met",
        "ZeRO-2 on 4 GPUs against 4 x 1 GPU, fp8: 80.0 %, wanted at least 96 %: missed",
        "sharded against ZeRO-2 on 4 GPUs, full: 80.0 %, wanted at least 82 %: missed",
        "sharded against ZeRO-2 on 4 GPUs, fp8: not measured; wanted at least 82 %",
        f"failed: {Row(4, SHARDED, FP8).name}: out of memory",
        f"failed: {Row(4, SHARDED, FULL, MIXED).name}: was not through when its time was over",
        "losses, sharded against ZeRO-2, 4 GPUs, full, 1024x4: 2.00e-02 apart at most",
        "halved: not ok: no",
        "part 1 was ended",
    ):
        assert line in lines
    assert "a rank killed: ok; went on after step 20, 12.3 s until" in table


def test_a_run_leaves_nothing_behind(
    group: "Processes",
    tmp_path: Path,
    tiny_base: Path,
    shards: Path,  # noqa: F811
) -> None:
    """Eight billion weights would not be there twice."""
    from hdl.engine.loop import train

    flags = [
        "--model.base",
        str(tiny_base),
        "--data.shards",
        str(shards),
        "--save.output",
        str(tmp_path / "run"),
    ]
    more = ["--train.steps", "2", "--train.warmup_steps", "0"]
    assert train(load_run([*flags, *more]), group) == 0
    engine = last_duties[0].__self__.state.engine  # type: ignore[attr-defined]
    alive = weakref.ref(engine.module)
    del engine
    assert alive() is not None
    leftover()
    gc.collect()
    assert alive() is None


def test_a_part_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Also what has left its session, and hears no signal but SIGKILL."""
    stubborn = "trap '' TERM; setsid bash -c \"trap '' TERM; echo begun; sleep 600\" & sleep 600"
    part = Part("stubborn", ["bash", "-c", stubborn], tmp_path, tmp_path / "log", {})
    other = Part("stubborn2", ["sleep", "600"], tmp_path, tmp_path / "log2", {})
    try:
        assert part.wait(time.time() + 20, lambda: "begun" in part.log.read_text())
        assert not part.wait(time.time() + 0.1)
        assert len(processes_of(part.mark)) >= 3
        part.end()
        assert not processes_of(part.mark) and part.status == -9
        assert other.status is None
    finally:
        part.end()
        other.end()
