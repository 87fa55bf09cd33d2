"""tools/bench_data.py as a person calls it, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/bench_data.py", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


RATES = {
    "prepare": ["images_a_second", "plain_images_a_second", "ratio", "ratio_cpu"],
    "index": ["seconds_new", "seconds_unchanged", "plain_seconds", "ratio", "peak_bytes"],
    "loader": ["ours", "plain", "ratio", "ratio_cpu", "resident_mib"],
    "stream": ["ratio"],
}


@pytest.mark.parametrize("what", RATES)
def test_each_measurement_is_printed_and_written(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = bench(what, "--tiny", "--folder", tmp_path, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["what"] == what and found["cores"] >= 1
    for name in RATES[what]:
        assert found[name] > 0 and f" {name}  " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # what was made is gone


def test_stream_compares_the_same_server_with_and_without_faults(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert bench("stream", "--tiny", "--rate", "3e6", "--shards", 8, "--json", out).returncode == 0
    found = json.loads(out.read_text())
    assert found["shards"] == 8 and found["rate"] == 3e6
    assert found["ratio"] == found["faulty"]["mb_per_s"] / found["clean"]["mb_per_s"]
    assert [found[run][what] for run in ("clean", "faulty") for what in ("wrong", "twice", "missing")] == [
        0
    ] * 6


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["loader", "--workers", 2], "--workers: loader has no such option"),
        (["prepare", "--images", 0], "--images 0: expected more than that"),
        (["index", "--json", "nowhere/at/all.json"], "no folder nowhere/at"),
    ],
)
def test_what_cannot_work_is_said_at_once(arguments: list[object], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
