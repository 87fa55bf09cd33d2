"""Imitating smaller cards: which settings are measured, and that they are measured on real steps."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hdl.bench import card_report, weights_from_disk
from hdl.bench.card_report import Taken
from hdl.bench.card_run import Figures, HostPeak, measure
from hdl.bench.cards import ROWS, Setting, planned, random_settings, reference, standing
from hdl.engine.processes import Processes
from hdl.memory.plan import GIB, GPUS, Host
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.config import read_config
from tests.engine.conftest import REPOSITORY

REAL = read_config(REPOSITORY / "tests/o1/o1-8b-config.json")
TINY_CONFIG = REPOSITORY / "tests/golden/o1-tiny/config.json"
TINY = Setting(
    64, 96, 2, 4, "fp8_once", ("products", "input", "everything", "products"), stream=3, offload=4, text=7
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.chdir(REPOSITORY)  # for ds_configs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_planned_within_its_bound(row) -> None:  # type: ignore[no-untyped-def]
    setting = planned(row, REAL, 32, GPUS["h100"], Host())
    assert setting.need(REAL).peak <= row.bound * GIB and setting.card == row.card
    spared = planned(row, REAL, 32, GPUS["h100"], Host(), spare=0.3)
    assert spared.need(REAL).peak <= (row.bound - 0.3) * GIB and spared.card == row.card
    bare = reference(setting)
    assert bare.card is None and bare.weights == setting.weights and not bare.stream and not bare.offload
    assert set(bare.keep) == {"everything"} and bare.work == setting.work
    assert setting.ms(REAL, GPUS["h100"]) <= row.ratio * bare.ms(REAL, GPUS["h100"]), (
        "as far as a plan can tell"
    )
    still = standing(setting)
    assert (
        still.in_place and still.stream == setting.stream and still.keep == setting.keep and not still.offload
    )


def test_random_settings_are_of_all_kinds_and_always_the_same() -> None:
    settings = random_settings(20, 0, REAL, 1536, 60 * GIB, 24 * GIB)
    assert settings == random_settings(20, 0, REAL, 1536, 60 * GIB, 24 * GIB)
    assert settings != random_settings(20, 1, REAL, 1536, 60 * GIB, 24 * GIB)
    for of in ("weights", "optimizer", "rank", "images"):
        assert len({getattr(s, of) for s in settings}) > 1
    for needed in (s.need(REAL) for s in settings):
        assert needed.peak <= 60 * GIB and needed.on_host() <= 24 * GIB
    assert {bool(s.stream) for s in settings} == {bool(s.offload) for s in settings} == {True, False}
    assert all(Setting.from_data(json.loads(json.dumps(s.as_data()))) == s for s in settings)


def test_settings_of_one_work_train_alike(group: Processes, tmp_path: Path, tiny_base: Path) -> None:
    """Where weights and activations are changes no loss, and every step is one of training."""
    (tmp_path / "config.json").write_text(TINY_CONFIG.read_text())
    checkpoint = open_checkpoint(tmp_path, random_init=True)

    def figures(setting: Setting) -> Figures:
        found = measure(setting, checkpoint, group, dtype=torch.float32, steps=3, warmup=1)
        assert (
            found.failed is None and found.reserved is None and len(found.seconds) == 3 and found.loading > 0
        )
        return found

    moving, still = figures(TINY), figures(standing(TINY))
    assert moving.losses == still.losses and len(set(moving.losses)) == 3
    assert set(moving.rates) == {"weights in", "things out", "things in"} and moving.block > 0
    assert not still.rates
    bare = figures(reference(TINY))
    assert bare.losses == pytest.approx(moving.losses, rel=0.05), (
        "e4m3 rounds LoRA elsewhere in streamed layers"
    )
    taken = Taken(TINY, moving, bare, still)
    assert taken.ratio and taken.over_streaming and taken.copies()
    table = card_report.as_markdown({ROWS[0]: taken}, checkpoint.config, GPUS["h100"])
    assert "max(work" in table and "2 layers' things travel beside" in table


def figures_of(reserved: float, ms: float, failed: str | None = None) -> Figures:
    return Figures(reserved=int(reserved * GIB), context=GIB // 2, seconds=[ms / 1e3] * 3, failed=failed)


def test_the_report_says_how_far_the_prediction_was() -> None:
    row = ROWS[0]
    setting = planned(row, REAL, 32, GPUS["h100"], Host())
    peak = setting.need(REAL).peak / GIB
    taken = Taken(setting, figures_of(peak / 1.04, 260), figures_of(36, 250))
    line = card_report.as_markdown({row: taken}, REAL, GPUS["h100"]).splitlines()[2]
    assert "| +4.0% |" in line and "| 1.04 | 1.10 |" in line and " + 0.5 |" in line
    lost = Taken(setting, figures_of(22, 0, "CUDA out of memory"))
    assert "OUT OF MEMORY" in card_report.as_markdown({row: lost}, REAL, GPUS["h100"])
    off = Taken(setting, figures_of(peak * 1.2, 260))
    table = card_report.random_as_markdown([taken, off, lost], REAL, GPUS["h100"])
    assert "1 of 3 within 8%, the worst -16.7%" in table


def test_loading_is_measured_from_the_disk(group: Processes, tmp_path: Path) -> None:
    base, cache = tmp_path / "base", tmp_path / "cache"
    weights_from_disk.write_checkpoint(TINY_CONFIG, base, CPU, torch.bfloat16)
    before = {file: file.stat().st_mtime_ns for file in base.iterdir()}
    weights_from_disk.write_checkpoint(TINY_CONFIG, base, CPU, torch.bfloat16)
    assert before == {file: file.stat().st_mtime_ns for file in base.iterdir()}, "it is written once"
    assert weights_from_disk.evict(base) == sum(f.stat().st_size for f in base.glob("*.safetensors"))
    assert weights_from_disk.disk_rate(base) > 0
    checkpoint = open_checkpoint(base)
    found = {}
    for load in weights_from_disk.LOADS[1:4]:
        setting = replace(TINY, weights=load.weights, stream=0, offload=0)
        folder = cache if load.cache else None
        figures = measure(setting, checkpoint, group, dtype=torch.float32, steps=0, warmup=0, cache=folder)
        assert figures.step is None and figures.host_peak >= figures.host_kept
        found[load] = figures, weights_from_disk.read_bytes(load, base, cache)
    sizes = [size for _, size in found.values()]
    assert sizes[0] == sizes[1] > sizes[2] > 0, "e4m3 is half of bfloat16"
    table = weights_from_disk.as_markdown(found, 1e9)
    assert "| fp8_once, cache read |" in table and "disk, one thread: 1.00 GB/s" in table


def test_the_host_is_watched_while_it_loads() -> None:
    with HostPeak() as host:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        host._stop.wait(0.2)
        del block
    assert host.peak > 48 * 2**20 and host.peak - host.kept > 32 * 2**20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["24gb", "--tiny"], "no row 24gb; there are 24gb-2048x1, 24gb-1024x4"),
        (["--tiny", "--steps", "0"], "--steps 0: too few"),
        (["--tiny", "--json", "no/such/out.json"], "no folder no/such"),
        pytest.param(
            [], "--tiny measures a tiny model", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="")
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_built(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("cards_tool", REPOSITORY / "tools/cards.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["cards.py", *arguments])
    monkeypatch.setattr(tool, "ask", lambda *_: pytest.fail("something was built"))
    with pytest.raises(SystemExit) as left:
        tool.command_line(tool.main)
    assert left.value.code == 1 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["8gb-1024x1", "--no-reference"], ["--random-settings", "2"]], ids=["rows", "random"]
)
def test_the_tool_on_a_tiny_model(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ran = subprocess.run(
        [sys.executable, "tools/cards.py", "--tiny", "--steps", "1", "--warmup", "1", "--rank", "4",
         "--json", str(out), *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    data = json.loads(out.read_text())
    found = data["settings"] if "settings" in data else list(data.values())
    for one in found:
        assert one["measured"]["seconds"] and one["predicted"]["peak"] > 0 and one["words"] in ran.stdout
