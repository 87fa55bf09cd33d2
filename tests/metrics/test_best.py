"""Which adapter is the best, and when a run is over."""

from pathlib import Path

import pytest

from hdl.config import load_run
from hdl.errors import HdlError
from hdl.metrics.best import BEST_FILE, best_text, is_over, judged, read_best


def test_the_score_is_the_gate_less_the_drift() -> None:
    best = judged(30, gate=0.9, drift=0.2, drift_weight=0.5)
    assert best.score == pytest.approx(0.8) and (best.step, best.gate, best.drift) == (30, 0.9, 0.2)


def test_the_best_is_remembered_in_the_runs_folder(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    best = judged(30, 0.9, 0.2, 1.0)
    (tmp_path / BEST_FILE).write_text(best_text(best))
    assert read_best(tmp_path) == best


@pytest.mark.parametrize(("step", "over"), [(30, False), (40, False), (50, True), (60, True)])
def test_a_run_is_over_when_it_has_stopped_getting_better(step: int, over: bool) -> None:
    assert is_over(judged(30, 1, 0, 1), step, every=10, stop_after=2) is over


def test_without_a_limit_or_a_score_it_goes_on() -> None:
    assert not is_over(judged(30, 1, 0, 1), 1000, every=10, stop_after=None)
    assert not is_over(None, 1000, every=10, stop_after=2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--validation.stop_after", "2"], "stop_after 2 goes by a score, which needs style"),
        (["--validation.style", "x:y"], "give prompts"),
        (["--validation.style_references", "pictures"], "style, which is not set"),
        (["--validation.memorization"], "give prompts"),
    ],
)
def test_options_that_need_others_say_so(flags: list[str], said: str) -> None:
    needed = ["--model.base", "b", "--data.shards", "s", "--save.output", "o"]
    with pytest.raises(HdlError, match=said):
        load_run([*needed, *flags])
