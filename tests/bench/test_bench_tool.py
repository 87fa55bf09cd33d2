"""tools/bench.py as a person calls it, on the tiny model."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hdl.bench import run as bench_run
from hdl.bench.arms import Arm, Setup
from hdl.bench.cases import all_cases
from hdl.bench.ours import EVERY, keeping
from hdl.bench.report import ALONE, as_data, as_markdown
from hdl.bench.timing import step_batches
from hdl.config import Lora, Preserve
from hdl.data.batches import pack
from hdl.engine.processes import Processes
from hdl.o1.checkpoint import open_checkpoint

REPOSITORY = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
Bench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bench() -> Bench:
    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "OMP_NUM_THREADS": "1"
        }
        return subprocess.run(
            [sys.executable, "tools/bench.py", *map(str, arguments)],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return start


@pytest.fixture
def setup(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # plain formulas are the quicker ones on a CPU
    return Setup(
        checkpoint=open_checkpoint(tiny_base, random_init=True),
        config_file=tiny_base / "config.json",
        lora=Lora(rank=4, alpha=4),
        dtype=torch.float32,
        processes=Processes(0, 1, torch.device("cpu")),
        engine="torch",
        strategy=REPOSITORY / "ds_configs/zero2.json",
    )


def test_a_tiny_run_prints_tables_and_writes_every_figure(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arms = ["stock", "plain", "bf16"]
    done = bench("1024x4", "mixed", "--tiny", "--arms", *arms, "--steps", 5, "--warmup", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert data["engine"] == "deepspeed" and set(data["cases"]) == {"1024x4", "mixed"}
    for name, case in data["cases"].items():
        assert set(case["arms"]) == set(arms) and case["alone"] == []
        assert all(value > 0 for value in case["ceilings_tflops"].values())
        losses = []
        for arm, figures in case["arms"].items():
            assert len(figures["seconds"]) == len(figures["losses"]) == 5
            median = sorted(figures["seconds"])[2]
            stock = case["arms"]["stock"]["step_seconds"]
            assert figures["step_seconds"] == median and figures["times_stock"] == stock / median
            assert f"| {arm}" in done.stdout and f"{median * 1e3:.1f}" in done.stdout
            losses.append(sum(figures["losses"]) / 5)
        assert case["arms"]["bf16"]["losses"] == pytest.approx(
            case["arms"]["plain"]["losses"], rel=1e-2 if torch.cuda.is_available() else 1e-4
        )
        # Stock and ours: the same weights, pixels and noise levels, other noise.
        assert max(losses) < 1.05 * min(losses), (name, losses)
    assert data["cases"]["1024x4"]["tokens_a_step"] == 4 * (10 + 4)
    assert "### mixed: 4 images" in done.stdout and "one by one" in done.stdout
    assert "as a share of 1024x4's: stock" in done.stdout


def test_the_arm_that_preserves_keeps_one_sample_of_five(bench: Bench, tmp_path: Path) -> None:
    cases = all_cases(tiny=False)
    batch = pack(cases["1024x5"].samples(0, 8), [0, 1, 2, 3, 4], 4096 * 5)
    kept = keeping(batch, 0)
    assert kept.kept == (False, False, False, False, True)
    assert Preserve().share == 1 / EVERY
    assert kept.base and kept.base.places == [4] and kept.base.layout.segments == batch.layout.segments[4:]
    assert kept.base.patches.equal(batch.patches[-1024:]) and kept.base.text.equal(batch.text[-160:])
    alone = [pack(cases["1024x1"].samples(step, 8), [0], 1024) for step in range(10)]
    assert [any(keeping(b, step).kept) for step, b in enumerate(alone)] == [
        False,
        False,
        False,
        False,
        True,
    ] * 2
    out = tmp_path / "kept.json"
    done = bench("1024x5", "--tiny", "--arms", "bf16", "kept", "--steps", 5, "--warmup", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    arms = json.loads(out.read_text())["cases"]["1024x5"]["arms"]
    # The adapter has hardly moved: of the kept fifth hardly an error is left.
    assert sum(arms["kept"]["losses"]) < 0.9 * sum(arms["bf16"]["losses"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["512x1", "--tiny"], 2, "512x1"),
        (["1024x1", "--tiny", "--arms", "stok"], 2, "stok"),
        (["1024x1", "--tiny", "--steps", "4"], 1, "--steps 4: at least 5"),
        (["1024x1", "--tiny", "--rank", "0"], 1, "--rank 0"),
        (["1024x1", "--tiny", "--json", "no/such/out.json"], 1, "no folder no/such"),
        pytest.param(["1024x1"], 1, "--tiny", marks=no_gpu),
        pytest.param(["1024x1", "--tiny", "--profile"], 1, "--profile", marks=no_gpu),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_built(
    arguments: list[str],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("bench_tool", REPOSITORY / "tools/bench.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    monkeypatch.setattr(tool, "common_setup", lambda args: pytest.fail("something was built"))
    with pytest.raises(SystemExit) as left:
        tool.command_line(tool.main)
    assert left.value.code == status
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


class Crowded(Arm):
    """More than `room` arms are too many for this GPU, and plain never survives 2048x1."""

    resident: list[str]
    room = 1

    def __init__(self, name: str, setup: Setup) -> None:
        if len(self.resident) == self.room:
            raise torch.OutOfMemoryError("full")
        super().__init__(name, setup)
        self.resident.append(name)

    def step(self, number: int, batches: Any) -> float:
        if self.name == "plain" and batches[0].layout.tokens == 10 + 16:
            raise torch.OutOfMemoryError("too much")
        return super().step(number, batches)

    def close(self) -> None:
        self.resident.remove(self.name)
        super().close()


def test_arms_that_do_not_fit_together_run_one_after_another(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Crowded, "resident", [], raising=False)
    monkeypatch.setattr(bench_run, "Arm", Crowded)
    cases = [all_cases(tiny=True)[name] for name in ("2048x1", "1024x1")]
    said: list[str] = []
    results = bench_run.run_cases(
        cases, ["stock", "plain"], setup, steps=5, warmup=1, profiled=False, say=said.append
    )
    assert [list(r.arms) for r in results] == [["stock"], ["stock", "plain"]]
    assert [r.alone for r in results] == [["stock", "plain"], ["stock", "plain"]]
    assert "plain did not fit into memory even alone at 2048x1" in said
    assert as_markdown(results).count(f"{ALONE} stock, plain") == 2
    ours, stock = results[1].arms["plain"], results[1].arms["stock"]
    assert as_data(results)["1024x1"]["arms"]["plain"]["times_stock"] == stock.step_time / ours.step_time


def test_arms_that_only_fit_in_pairs_take_turns_with_stock(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Crowded, "resident", [], raising=False)
    monkeypatch.setattr(Crowded, "room", 2)
    monkeypatch.setattr(bench_run, "Arm", Crowded)
    cases = [all_cases(tiny=True)["1024x1"]]
    names = ["stock", "plain", "bf16"]
    said: list[str] = []
    result = bench_run.run_cases(cases, names, setup, steps=5, warmup=1, profiled=False, say=said.append)[0]
    assert list(result.arms) == names and not result.alone
    assert said.count("built stock") == 3  # once in vain, then beside each
    for name in ("plain", "bf16"):
        assert result.arms[name].stock_time  # of its own turns
    assert result.arms["stock"].stock_time == result.arms["bf16"].stock_time
    assert result.arms["stock"].stock_time != result.arms["plain"].stock_time


def test_one_arm_needs_no_stock_beside_it(setup: Setup) -> None:
    results = bench_run.run_cases(
        [all_cases(tiny=True)["1024x1"]],
        ["plain"],
        setup,
        steps=5,
        warmup=1,
        profiled=False,
        say=lambda _: None,
    )
    assert as_data(results)["1024x1"]["arms"]["plain"]["times_stock"] is None
    assert "| plain" in as_markdown(results)


def test_an_adapter_learns_in_every_arm(setup: Setup) -> None:
    """Steps change the adapter: what is timed is training."""
    for name in ("stock", "plain"):
        arm = Arm(name, setup)
        before = [p.detach().clone() for p in arm.engine.parameters]
        case = all_cases(tiny=True)["1024x4"]
        for number in range(2):
            batches = step_batches(case, [arm], setup.checkpoint.config, number)
            arm.step(number, batches[name])
        assert all(not torch.equal(p, was) for p, was in zip(arm.engine.parameters, before)), name
        assert arm.engine.get_global_grad_norm() > 0
