"""The average of the adapter: what it is, that it survives, and that a run does not notice it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hdl.engine.checkpoints import AVERAGE_FILE, verify
from hdl.sample.draw import draw_prompts
from hdl.sample.generate import SamplerSettings
from tests.engine.conftest import Finished
from tests.engine.forked import Server
from tests.engine.test_faults import AT_STEP_6, SPOILED

Described = Callable[..., list[str]]
STEPS, DECAY = 6, 0.3
PROMPTS = ["a cat", "a rocket", "coins"]
PICTURES: dict[str, object] = {
    "validation__prompts": json.dumps(PROMPTS), "validation__height": 64, "validation__width": 32,
    "validation__steps": 2,
}  # fmt: skip
OPTIONS: dict[str, object] = {
    "train__steps": STEPS, "save__every": 1, "data__held_out": 0.3, "validation__held_out_samples": 3,
    "lora__dropout": 0.0,
}  # fmt: skip
AVERAGED: dict[str, object] = {"train__ema": DECAY, "validation__every": 2, **PICTURES}
ZERO3: dict[str, object] = {"train__deepspeed": "ds_configs/zero3.json"}
BFLOAT16: dict[str, object] = {"model__dtype": "bfloat16", "lora__dropout": 0.1}
# Processes, and what else. divided: ZeRO-3 that leaves no matrix of the adapter whole, by a file of its own.
KINDS: dict[str, tuple[int, dict[str, object]]] = {
    "one": (1, {}),
    "fused": (1, {"model__kernels": "fused"}),
    "two": (2, {}),
    "zero3": (2, ZERO3),
    "divided": (2, ZERO3),
    "bfloat16": (2, BFLOAT16),
    "in place": (2, BFLOAT16 | {"train__master": "bfloat16"}),
}


def finished(
    server: Server, arguments: list[str], output: Path, processes: int = 1, first: str = ""
) -> Finished:
    job = server.start(arguments, processes=processes, first=first)
    assert job.wait() == 0, job.printed
    return Finished(0, job.printed, output)


@pytest.fixture(scope="module")
def memo() -> dict[str, Finished]:
    return {}


@pytest.fixture
def run_of(
    server: Server, described: Described, tmp_path: Path, memo: dict[str, Finished]
) -> Callable[[str], Finished]:
    """The run of a kind that has an average and draws with it."""

    def run(kind: str) -> Finished:
        if kind not in memo:
            processes, options = options_of(kind, tmp_path)
            arguments = described(kind, **OPTIONS | AVERAGED | options)
            memo[kind] = finished(server, arguments, tmp_path / kind, processes)
        return memo[kind]

    return run


def options_of(kind: str, folder: Path) -> tuple[int, dict[str, object]]:
    processes, options = KINDS[kind]
    if kind == "divided":
        strategy = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        (folder / "divided.json").write_text(json.dumps(strategy))
        options = {"train__deepspeed": folder / "divided.json"}
    return processes, options


def saved(run: Finished, step: int, file: str = "adapter_model.safetensors") -> dict[str, Tensor]:
    return load_file(run.output / f"checkpoints/step-{step:06d}" / file)


def averages(run: Finished, step: int) -> dict[str, Tensor]:
    return saved(run, step, AVERAGE_FILE)


def averaged_updates(run: Finished, step: int) -> int:
    return int(
        json.loads((run.output / f"checkpoints/step-{step:06d}/trainer_state.json").read_text())["averaged"]
    )


def only_until(run: Finished, step: int, copy: Path) -> None:
    """A copy of the run as it was after so many steps."""
    shutil.copytree(run.output, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name[-6:]) > step:
            shutil.rmtree(checkpoint)
    for adapter in copy.glob("adapter*"):
        shutil.rmtree(adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_average_of_the_saved_adapters(run_of: Callable[[str], Finished], kind: str) -> None:
    run = run_of(kind)
    expected: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        verify(run.output / f"checkpoints/step-{step:06d}")
        weights, found = saved(run, step), averages(run, step)
        k = step - 1
        decay = min(DECAY, (1 + k) / (10 + k)) if k else 0.0
        for name, weight in weights.items():
            before = expected.get(name, weight).double()
            expected[name] = decay * before + (1 - decay) * weight.double()
            assert torch.allclose(found[name].double(), expected[name], rtol=1e-5, atol=1e-8), (step, name)
        assert found.keys() == weights.keys() and {a.dtype for a in found.values()} == {torch.float32}
        assert averaged_updates(run, step) == step
    assert any((found[n] - w).norm() > 1e-3 * w.norm() for n, w in weights.items())  # it is not the adapter
    if kind == "in place":
        assert any(not torch.equal(a, a.bfloat16().float()) for a in found.values())
    installed = load_file(run.output / "adapter_ema/adapter_model.safetensors")
    assert all(torch.equal(installed[name], average) for name, average in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice(
    server: Server, described: Described, tmp_path: Path, run_of: Callable[[str], Finished], kind: str
) -> None:
    """To the bit, whether or not a run averages, and draws and measures with the average in between."""
    averaging = run_of(kind)
    processes, options = options_of(kind, tmp_path)
    arguments = described("plain", **OPTIONS | {"validation__every": STEPS} | options)
    plain = finished(server, arguments, tmp_path / "plain", processes)
    for name in ("loss", "grad_norm"):
        assert averaging.curve(name) == plain.curve(name) and len(plain.curve(name)) == STEPS, name
    held_out = averaging.curve("held_out/loss")
    assert {step: held_out[step] for step in (0, STEPS)} == plain.curve("held_out/loss")
    for step in range(1, STEPS + 1):
        assert all(torch.equal(w, saved(averaging, step)[n]) for n, w in saved(plain, step).items())
    assert not (plain.output / "adapter_ema").exists()
    assert not list((plain.output / "checkpoints").glob(f"*/{AVERAGE_FILE}"))
    assert "held_out_ema/loss" not in plain.curve_names()


@pytest.mark.parametrize("kind", ["fused", "two", "zero3", "divided"])
def test_it_does_not_depend_on_how_a_run_is_spread(run_of: Callable[[str], Finished], kind: str) -> None:
    one, other = run_of("one"), run_of(kind)
    curve = one.curve("held_out_ema/loss")
    assert curve.keys() == {0, 2, 4, 6} and len(set(curve.values())) == 4
    assert other.curve("held_out_ema/loss") == pytest.approx(curve, rel=5e-5)
    for name, average in averages(one, STEPS).items():
        assert (average - averages(other, STEPS)[name]).norm() < 2e-3 * average.norm(), name


@pytest.mark.parametrize("kind", ["fused", "two", "divided"])
def test_what_is_drawn_with_it(run_of: Callable[[str], Finished], tiny_base: Path, kind: str) -> None:
    """As the checkpoint's file draws on its own; other pictures than the adapter's."""
    run = run_of(kind)
    sheet = np.asarray(Image.open(run.output / f"pictures/step-{STEPS:06d}.png"), int)
    drawn = draw_prompts(
        tiny_base, PROMPTS, SamplerSettings("full", 2, 5.0, 3.0), seeds=range(3), height=64, width=32, together=2,
        adapter=run.output / f"checkpoints/step-{STEPS:06d}" / AVERAGE_FILE, device="cpu",
    )  # fmt: skip
    for i, drawing in enumerate(drawn):
        enlarged = np.asarray(drawing.image.resize((96, 192), Image.Resampling.LANCZOS), int)
        top = 21 + i * (192 + 13 + 8)
        with_adapter, with_average = (sheet[top : top + 192, left : left + 96] for left in (112, 216))
        assert np.abs(with_average - enlarged).max() <= 3
        assert np.abs(with_average - with_adapter).max() > 3
    measured, averaged = run.curve("held_out/loss"), run.curve("held_out_ema/loss")
    assert averaged[0] == measured[0]  # there is nothing to average yet
    assert averaged[STEPS] != pytest.approx(measured[STEPS], rel=1e-6)


@pytest.mark.parametrize("kind", ["two", "in place"])
def test_a_run_that_is_resumed_has_the_same(
    server: Server, described: Described, tmp_path: Path, run_of: Callable[[str], Finished], kind: str
) -> None:
    whole = run_of(kind)
    only_until(whole, 3, tmp_path / "half")
    processes, options = options_of(kind, tmp_path)
    arguments = [*described("half", **OPTIONS | AVERAGED | options), "--resume"]
    half = finished(server, arguments, tmp_path / "half", processes)
    assert "resuming after step 3" in half.printed and "train.ema" not in half.printed
    for file in ("adapter/adapter_model.safetensors", "adapter_ema/adapter_model.safetensors"):
        assert (half.output / file).read_bytes() == (whole.output / file).read_bytes(), file
    assert averaged_updates(half, STEPS) == STEPS
    assert half.curve("held_out_ema/loss") == whole.curve("held_out_ema/loss")


# Resumes, and saves what it finds again, under the same name.
SAVED_AGAIN = """
import hdl.engine.loop as loop

def go(self):
    self.saver._begun = None
    self.saver.save(self.done, self.skipping.state(), None)
    self.saver.finish()
    return 0

loop.Loop.go = go
"""


def test_it_means_the_same_to_any_number_of_ranks(
    server: Server, described: Described, tmp_path: Path, run_of: Callable[[str], Finished]
) -> None:
    written = run_of("zero3")
    for processes, stage in [(1, 2), (4, 2), (2, 3)]:
        copy = tmp_path / f"{processes}-{stage}"
        only_until(written, 3, copy)
        options = OPTIONS | AVERAGED | {"train__deepspeed": f"ds_configs/zero{stage}.json"}
        arguments = [*described(copy.name, **options), "--resume"]
        again = finished(server, arguments, copy, processes, SAVED_AGAIN)
        assert averaged_updates(again, 3) == 3
        ours, theirs = (r.output / "checkpoints/step-000003" / AVERAGE_FILE for r in (again, written))
        assert ours.read_bytes() == theirs.read_bytes(), (processes, stage)


def test_it_can_be_begun_and_given_up_in_the_middle(
    server: Server, described: Described, tmp_path: Path, run_of: Callable[[str], Finished]
) -> None:
    whole = run_of("one")
    only_until(whole, 3, tmp_path / "without")
    arguments = [*described("without", **OPTIONS | {"train__steps": 4}), "--resume"]
    without = finished(server, arguments, tmp_path / "without")
    assert (
        "train.ema 0: the average in" in without.printed and "step-000003 is not gone on" in without.printed
    )
    assert not (without.output / "checkpoints/step-000004" / AVERAGE_FILE).exists()
    assert not (without.output / "adapter_ema").exists()
    arguments = [*described("without", **OPTIONS | {"train__ema": DECAY, "train__steps": 4}), "--resume"]
    finished(server, arguments, tmp_path / "without")  # there is nothing left to average
    assert not (without.output / "adapter_ema").exists()

    arguments = [*described("without", **OPTIONS | {"train__ema": DECAY}), "--resume"]
    begun = finished(server, arguments, tmp_path / "without")
    assert "train.ema 0.3:" in begun.printed and "step-000004 holds no average" in begun.printed
    assert averaged_updates(begun, 6) == 2
    for name, weight in saved(begun, 6).items():
        expected = 2 / 11 * saved(begun, 5)[name] + 9 / 11 * weight
        assert torch.allclose(averages(begun, 6)[name], expected, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize(
    ("what", "value", "options"),
    [
        ("loss", "float('nan')", {}),
        ("gradient", "nan", BFLOAT16),
        ("gradient", "nan", ZERO3),
    ],
)
def test_a_skipped_step_leaves_it_alone(
    server: Server, described: Described, tmp_path: Path, what: str, value: str, options: dict[str, Any]
) -> None:
    spoiled = AT_STEP_6.format(what=SPOILED[what].format(value=value).strip())
    arguments = described("run", **{"train__steps": 7, "save__every": 1, "train__ema": DECAY} | options)
    run = finished(server, arguments, tmp_path / "run", processes=2, first=spoiled)
    assert f"skipped a step: the {what} of step 6" in run.printed
    assert [averaged_updates(run, step) for step in (5, 6, 7)] == [5, 5, 6]
    before, skipped, after = (averages(run, step) for step in (5, 6, 7))
    assert all(torch.equal(average, skipped[name]) for name, average in before.items())
    assert any(not torch.equal(average, after[name]) for name, average in before.items())
