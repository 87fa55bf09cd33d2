"""launch/bench_8gpu.sh on the small O1 and two processes of the CPU: every row, every fault, and a row that breaks down."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hdl.fleet.part import rank_of
from hdl.fleet.rows import (
    EQUAL,
    FP8,
    FULL,
    MIXED,
    PLANNED,
    PRESET,
    SHARDED,
    ZERO2,
    ZERO3,
    Row,
    all_rows,
)
from tests.engine.conftest import REPOSITORY
from tests.launch.conftest import ENVIRONMENT, clean

pytestmark = pytest.mark.job
BROKEN = Row(2, SHARDED, FP8, MIXED)


def script(out: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [REPOSITORY / "launch" / "bench_8gpu.sh", out, "--tiny", "--deadline", "560"],
        env=clean(os.environ) | ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_the_table_of_two_processes(tmp_path: Path) -> None:
    """A rank of the row BROKEN is killed: it alone is lost."""
    out = tmp_path / "out"
    with script(out, PROCESSES="2") as run:
        try:
            until = time.monotonic() + 300
            while not (out / "rows" / f"{BROKEN.name}.begun").exists():
                assert run.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            victim = rank_of(f"{run.pid}/all", 1)
            assert victim
            os.kill(victim, signal.SIGKILL)
            printed, _ = run.communicate(timeout=500)
        finally:
            run.terminate()
    assert run.returncode == 0, printed
    table = (out / "table.md").read_text()
    assert table in printed

    results = json.loads((out / "results.json").read_text())
    states = {row["name"]: row["state"] for row in results["rows"]}
    preset = Row(2, PRESET, PLANNED)  # plans for GPUs, and says so
    assert states == {
        row.name: "failed" if row in (BROKEN, preset) else "measured" for row in all_rows(2)
    }, printed  # fmt: skip
    assert f"failed: {preset.name}: model.memory auto plans the fused path on a GPU" in table
    assert f"failed: {BROKEN.name}: " in table

    data = {row["name"]: row["data"] for row in results["rows"] if row["state"] == "measured"}
    for name, of in data.items():
        steps = 6 if name == Row(2, ZERO3, FULL).name else 30 if name.endswith(MIXED) else 12
        assert len(of["seconds"]) == steps
        assert min(of["seconds"]) > 0
    assert set(data[Row(2, ZERO2, FULL).name]["tokens"]) == {2 * 4 * (4 + 40)}
    assert set(data[Row(1, ZERO2, FULL).name]["tokens"]) == {4 * (4 + 40)}
    assert len(set(data[Row(2, ZERO2, FULL, MIXED).name]["tokens"])) > 1
    # Shared out or whole, the same float32 losses; by DeepSpeed, too, for the steps that it takes.
    for kind in (EQUAL, MIXED):
        whole, shared = (data[Row(2, strategy, FULL, kind).name]["losses"] for strategy in (ZERO2, SHARDED))
        assert shared == pytest.approx(whole, rel=1e-5)
    whole, divided = (data[Row(2, strategy, FULL).name]["losses"] for strategy in (ZERO2, ZERO3))
    assert divided == pytest.approx(whole[:6], rel=1e-4)

    killed, halved = results["faults"]
    assert killed["why"] is None and killed["resumed"] == 20 and killed["seconds"] > 0 and killed["stalls"]
    assert halved["why"] is None and halved["resumed"] == 60
    assert [one["found"] is not None for one in results["wanted"]] == [True] * 4
    assert table.count(": met\n") + table.count(": missed\n") == 4


def test_what_it_refuses(tmp_path: Path) -> None:
    for processes, said in (("3", "3 GPU(s), expected an even number"), ("two", "PROCESSES is 'two'")):
        with script(tmp_path / "out", PROCESSES=processes) as run:
            printed, _ = run.communicate(timeout=60)
        assert run.returncode == 1 and said in printed
    (tmp_path / "out" / "rows").mkdir(parents=True)
    with script(tmp_path / "out", PROCESSES="2") as run:
        printed, _ = run.communicate(timeout=60)
    assert run.returncode == 1 and "holds a measurement already" in printed
