"""tools/bench_sample.py on the tiny model, and that its arms draw the same."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hdl.bench import draw_run
from hdl.bench.draw_arms import ARMS, DrawArm, DrawSetup, draw_cases
from hdl.bench.draw_run import DrawMeasured, DrawResult, as_data, as_markdown, run_draw_cases
from hdl.config import Lora
from hdl.o1.checkpoint import open_checkpoint

REPOSITORY = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.fixture
def setup(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> DrawSetup:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # plain formulas are the quicker ones on a CPU
    checkpoint = open_checkpoint(tiny_base, random_init=True)
    lora = Lora(rank=4, alpha=4)
    return DrawSetup(checkpoint, tiny_base / "config.json", lora, torch.device("cpu"), torch.float32)


def test_a_tiny_run_prints_tables_and_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    line = ["tools/bench_sample.py", "1024x8", "--tiny", "--steps", "3", "--warmup", "1", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, *line], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "### 1024x8: 8 x 64x64 px" in done.stdout
    arms = json.loads(out.read_text())["cases"]["1024x8"]["arms"]
    assert list(arms) == list(ARMS)
    stock = arms["stock"]
    assert stock["reading"] == stock["whole"] == [] and stock["gain_of_reading_once"] is None
    for figures in arms.values():
        assert len(figures["seconds"]) == 3 and figures["step_seconds"] == sorted(figures["seconds"])[1]
        reading = sorted(figures["reading"])[1] if figures["reading"] else 0.0
        assert figures["picture_seconds"] == pytest.approx(50 * figures["step_seconds"] + reading)
        assert figures["picture_times_stock"] == stock["picture_seconds"] / figures["picture_seconds"]
        assert f"{figures['step_seconds'] * 1e3:.1f}" in done.stdout
    on_gpu = torch.cuda.is_available()
    assert arms["bf16"]["off"] < (0.03 if on_gpu else 1e-5) and 1e-4 < arms["fp8"]["off"] < 0.1


def test_all_arms_take_the_same_steps(setup: DrawSetup) -> None:
    """Guided, with an adapter that does something; the adapter counts."""
    case = draw_cases(tiny=True)["1024x8"]
    drawn: dict[str, Tensor] = {}
    for name in ("stock", "bf16"):
        arm = DrawArm(name, setup)
        arm.begin(case)
        for _ in range(3):
            arm.step()
        drawn[name] = arm.z
        if name == "bf16":
            arm.begin(case, once=False)
            for _ in range(3):
                arm.step()
            drawn["text in every step"] = arm.z
            with arm.model.disable_adapter():
                arm.begin(case)
                arm.step()
                without = arm.predict()
                arm.read()
            assert (arm.predict() - without).norm() / without.norm() > 1e-3
    for name, z in drawn.items():
        assert (z - drawn["stock"]).norm() / drawn["stock"].norm() < 1e-5, name


def test_arms_take_turns(setup: DrawSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step = DrawArm.step
    monkeypatch.setattr(DrawArm, "step", lambda arm: [order.append(arm.name), step(arm)][1])
    monkeypatch.setattr(draw_run, "_measure_apart", lambda arm, *_: arm.end())
    cases = [draw_cases(tiny=True)["2048x1"]]
    [result] = run_draw_cases(
        cases, ["stock", "bf16"], setup, steps=2, warmup=1, profiled=False, say=order.append
    )
    assert order[2:-1] == ["stock", "bf16"] * 4
    assert [len(found.seconds) for found in result.arms.values()] == [2, 2]


def test_figures() -> None:
    stock, ours = (
        DrawMeasured([2.0, 4.0, 3.0]),
        DrawMeasured([1.0, 1.0, 5.0], [10.0], [1.5], 2**30, 2**31, 0.01),
    )
    result = DrawResult(draw_cases(tiny=False)["2048x1"], {"stock": stock, "bf16": ours})
    figures = as_data([result])["2048x1"]["arms"]["bf16"]
    assert figures["step_times_stock"] == 3.0 and figures["picture_seconds"] == 60.0
    assert figures["picture_times_stock"] == 2.5 and figures["gain_of_reading_once"] == 1.25
    row = next(line for line in as_markdown([result]).splitlines() if line.startswith("| bf16"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["bf16", "1000.0", "1000.0", "5000.0", "3.00", "10000.0", "60.00", "2.50", "1500.0", "1.250", "1.00", "2.00", "1.0e-02"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["512x1", "--tiny"], 2, "512x1"),
        (["1024x8", "--tiny", "--steps", "2"], 1, "--steps 2: at least 3"),
        (["1024x8", "--tiny", "--steps", "47"], 1, "a picture has 50 steps"),
        (["1024x8", "--tiny", "--warmup", "0"], 1, "--warmup 0"),
        (["1024x8", "--tiny", "--json", "no/such/out.json"], 1, "no folder no/such"),
        pytest.param(["1024x8"], 1, "--tiny", marks=no_gpu),
        pytest.param(["1024x8", "--tiny", "--profile"], 1, "--profile", marks=no_gpu),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_built(
    arguments: list[str],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("bench_sample_tool", REPOSITORY / "tools/bench_sample.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["bench_sample.py", *arguments])
    monkeypatch.setattr(tool, "run_draw_cases", lambda *_, **__: pytest.fail("something was built"))
    with pytest.raises(SystemExit) as left:
        tool.command_line(tool.main)
    assert left.value.code == status
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
