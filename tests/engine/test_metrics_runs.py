"""Runs that measure what they do, keep the best adapter and stop when it gets no better."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine.conftest import Launch
from tests.engine.forked import Server

# Scores the validation's pictures by a script, after the blank one that it is tried out with: of the prompts asked for
# with the trigger and without, in turn.
SCORES = """
COUNT = iter(range(-1, 1000))
WITH = {scores}

def score(picture):
    number = next(COUNT)
    return WITH[number // 2] if number % 2 == 0 and number >= 0 else 0.1
"""
MEASURED = {
    "data__trigger": "a photograph", "preserve__share": 0.25,  # a draw of every step of four
    "validation__prompts": ["a photograph of coins", "coins"],
    "validation__height": 64, "validation__width": 64, "validation__steps": 2, "validation__guidance_scale": 1.0,
    "validation__every": 2, "validation__memorization": True, "validation__drift_weight": 0.0,
}  # fmt: skip


def curves(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture
def start(
    server: Server, described: Callable[..., list[str]], tmp_path: Path
) -> Callable[..., tuple[int, str, Path]]:
    """A run on two ranks that is given these scores."""

    def started(name: str, scores: list[float], *flags: str, **options: object) -> tuple[int, str, Path]:
        (tmp_path / f"scores_of_{name}.py").write_text(SCORES.format(scores=scores))
        module = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        config = tmp_path / f"{name}.toml"
        in_file = ("validation__prompts", "validation__memorization")  # no flag is given a list, or a yes
        config.write_text(
            tomli_w.dumps({"validation": {name.split("__")[1]: MEASURED[name] for name in in_file}})
        )
        usual = {k: v for k, v in MEASURED.items() if k not in in_file}
        usual |= {"validation__style": f"scores_of_{name}:score", "save__every": 100}
        arguments = described(name, **usual | options)
        job = server.start([str(config), *arguments, *flags], first=module)
        return job.wait(), job.printed, tmp_path / name

    return started


def test_the_best_adapter_is_kept_and_a_run_that_gets_no_better_ends(start: Callable) -> None:  # type: ignore[type-arg]
    status, printed, run = start("peaked", [0.1, 0.5, 0.9, 0.8, 0.7, 0.6, 0.95], validation__stop_after=2)
    assert status == 0, printed
    found = curves(run)
    assert found["style/gate"] == pytest.approx({0: 0.0, 2: 0.4, 4: 0.8, 6: 0.7, 8: 0.6})
    assert found["style/with"][4] == pytest.approx(0.9) and found["style/without"][4] == pytest.approx(0.1)
    assert "stopped after step 8: no better score than 0.800 since step 4" in printed
    assert max(found["loss"]) == 8
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["step"] == 4 and best["score"] == pytest.approx(0.8)
    kept = load_file(run / "best" / "adapter_model.safetensors")
    saved = load_file(run / "checkpoints" / "step-000004" / "adapter_model.safetensors")
    last = load_file(run / "adapter" / "adapter_model.safetensors")
    assert kept.keys() == saved.keys() and all(kept[n].equal(saved[n]) for n in kept)
    assert any(not kept[n].equal(last[n]) for n in kept)
    assert (run / "summary.html").exists()

    for name in ("drift", "change", "drift/relative", "memorization/adapter", "memorization/base"):
        assert set(found[name]) == {0, 2, 4, 6, 8}, name
    assert found["drift"][0] == found["change"][0] == 0.0
    assert found["drift"][8] > 0 and found["change"][8] > 0
    assert found["drift/relative"][8] == pytest.approx(found["drift"][8] / found["change"][8], rel=1e-5)
    assert found["memorization/base"][0] == found["memorization/base"][8] == found["memorization/adapter"][0]
    assert set(found["preserve/error"]) == set(found["loss"])  # a draw of every step of four


def test_a_resumed_run_remembers_its_best(start: Callable) -> None:  # type: ignore[type-arg]
    status, printed, _ = start("resumed", [0.1, 0.9], train__steps=2, train__schedule="constant")
    assert status == 0, printed
    status, printed, run = start(
        "resumed", [0.5, 0.4, 0.3], "--resume", "must",
        train__steps=12, train__schedule="constant", validation__stop_after=2,
    )  # fmt: skip
    assert status == 0, printed
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 2
    assert "stopped after step 6" in printed


def test_a_score_that_fails_ends_the_run_before_it_begins(launch: Launch) -> None:
    run = launch(**MEASURED | {"validation__style": "tests.engine.test_metrics_runs:broken"})
    assert run.status == 1
    assert (
        "validation.style 'tests.engine.test_metrics_runs:broken' failed (ValueError('no mouth'))"
        in run.printed
    )
    assert "Traceback" not in run.printed


def broken(picture: object) -> float:
    raise ValueError("no mouth")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"validation__prompts": ["coins"]}, "no prompt is with 'a photograph'"),
        ({"validation__prompts": ["a photograph of coins"]}, "no prompt is without 'a photograph'"),
        ({"data__trigger": "a fotograph"}, "data.trigger 'a fotograph' is in no caption"),
        ({"data__phrases": ["explicit"]}, "data.phrases 'explicit' is in no caption"),
        ({"validation__style": "nowhere:score"}, "'nowhere:score' cannot be imported"),
    ],
)
def test_what_cannot_be_measured_is_told_before_a_weight_is_read(
    launch: Launch, options: dict[str, object], said: str
) -> None:
    run = launch(**MEASURED | {"validation__style": "tests.engine.test_metrics_runs:broken"} | options)
    assert run.status == 1 and said in run.printed and "starting" not in run.printed, run.printed
