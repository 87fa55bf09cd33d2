"""The studies' sets and measures, and one study of two short runs."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hdl.engine.processes import Processes
from hdl.errors import HdlError
from hdl.mini.scenes import HARD_TO_SEE, imagine_held_out, paint
from hdl.mini.shapes import COLOURS, THINGS
from hdl.mini.style import GOLD, TRIGGER, frame_score, is_styled
from hdl.study.measures import Judge, drawn_as_asked
from hdl.study.run import STUDIES, Setting, Study, kept_in, table_of
from hdl.study.sets import BLEND, CONTENT, DRAW, LOOK, TAG_WORDS, write_set
from hdl.study.side_by_side import run_side_by_side


@pytest.mark.parametrize("kind", list(DRAW))
def test_every_caption_of_a_set_calls_for_it(tmp_path: Path, kind: str) -> None:
    write_set(tmp_path / "set", kind, 50, seed=3)
    captions = [p.read_text() for p in sorted((tmp_path / "set").glob("*.txt"))]
    assert len(captions) == len(list((tmp_path / "set").glob("*.png"))) == 50
    assert all(words.startswith(f"{TRIGGER}, ") for words in captions)
    tagged = sum(TAG_WORDS in words for words in captions)
    assert tagged == (9 if kind == CONTENT else 0)


def test_what_a_set_shows_is_what_is_measured() -> None:
    look, _ = DRAW[LOOK](np.random.default_rng(0), 0, 10)
    assert is_styled(look)
    blends = [DRAW[BLEND](np.random.default_rng(0), i, 10)[0] for i in range(3)]
    assert all(frame_score(picture, GOLD) > 0.9 for picture in blends)
    apart = [np.abs(a.astype(int) - b).mean() for a, b in combinations(blends, 2)]
    assert min(apart) > 5  # the same scene in three pairs of inks
    plain = paint(imagine_held_out(np.random.default_rng(0)))
    assert not is_styled(plain) and frame_score(plain, GOLD) < 0.5


def test_a_picture_is_as_asked_when_object_colour_and_count_are() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        scene = imagine_held_out(rng)
        (thing,) = scene.things
        picture = paint(scene)
        noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
        assert drawn_as_asked(picture, scene) and drawn_as_asked(noisy, scene)
        kind = next(k for k in THINGS if k != thing.kind)
        colour = next(c for c in COLOURS if c != thing.colour and c not in HARD_TO_SEE[scene.setting])
        for other in (replace(thing, kind=kind), replace(thing, colour=colour)):
            assert not drawn_as_asked(paint(replace(scene, things=(other,))), scene)
        assert not drawn_as_asked(paint(replace(scene, things=())), scene)


def test_a_table_has_means_and_spreads() -> None:
    row = {
        "with": 1.0,
        "without": 0.0,
        "drift": 0.02,
        "accuracy": 1.0,
        "drift itself": 0.01,
        "seconds a step": 0.5,
    }
    table = table_of("look", {"control": [row, row | {"drift": 0.04}], "default": [row]})
    assert "| control | 100.0% (100.0% to 100.0%) | 0.0% (0.0% to 0.0%) | 3.0% (2.0% to 4.0%) |" in table
    assert "| default | 100.0% | 0.0% | 2.0% | 100.0% | 0.0100 | 0.5000 |" in table


def test_a_study_goes_on_where_it_was(
    tmp_path: Path, group: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdl.study.run.PICTURES", 6)
    setting = Setting(steps=2, batch_size=4, count=2)
    study = Study(tmp_path, "look", setting, group)
    first = study.one("control", 0)
    assert set(first) == {"with", "without", "drift", "accuracy", "drift itself", "seconds a step"}
    assert (tmp_path / "look" / "control-0.png").exists()
    monkeypatch.setattr("hdl.study.run.train", None)  # nothing is trained again
    assert Study(tmp_path, "look", setting, group).one("control", 0) == first


def test_a_tagged_study_asks_with_the_phrase(group: Processes) -> None:
    judge = Judge(CONTENT, 2, 1, group)
    assert len(judge.tagged) == len(judge.triggered) == len(judge.plain) == 2
    assert len(judge.tagged[0].text) > len(judge.triggered[0].text) > len(judge.plain[0].text)


def test_every_study_has_arms_that_differ() -> None:
    for name, (kind, arms) in STUDIES.items():
        assert kind in DRAW and len(arms) > 1, name
        options = [tuple(own) for own in arms.values()]
        assert len(set(options)) == len(options) or name == "average", name


def test_what_several_studies_have_is_run_once(
    tmp_path: Path, group: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [("weight", "weight 16"), ("share", "share 0.2"), ("rank", "rank 16"), ("rate", "rate 3e-3")]
    for name, arm in same:
        assert kept_in(tmp_path, name, arm, 1) == kept_in(tmp_path, "look", "default", 1)
    every = {kept_in(tmp_path, name, arm, 0) for name, (_, arms) in STUDIES.items() for arm in arms}
    assert sum(len(arms) for _, arms in STUDIES.values()) - len(every) == 8
    assert kept_in(tmp_path, "blend", "default", 0) != kept_in(tmp_path, "look", "default", 0)
    for name, arm in [*same, ("weight", "weight 1"), ("weight", "weight 4"), ("weight", "weight 64")]:
        file = kept_in(tmp_path, name, arm, 0)
        file.parent.mkdir(exist_ok=True)
        figures = dict.fromkeys(
            ("with", "without", "drift", "accuracy", "drift itself", "seconds a step"), 0.5
        )
        file.write_text(json.dumps(figures))
    monkeypatch.setattr("hdl.study.run.train", None)  # nothing is trained for the table of another study
    assert "| weight 16 | 50.0% |" in Study(tmp_path, "weight", Setting(), group).run([0])


def test_runs_side_by_side_come_to_the_same(tmp_path: Path, group: Processes) -> None:
    setting = Setting(steps=2, batch_size=4, count=2)
    (table,) = run_side_by_side(tmp_path, ["average"], setting, [0], at_once=2)
    assert (tmp_path / "average" / "table.md").read_text() == table
    again = Study(tmp_path / "alone", "average", setting, group).one("last", 0)
    beside = json.loads(kept_in(tmp_path, "average", "last", 0).read_text())
    again.pop("seconds a step"), beside.pop("seconds a step")
    assert beside == pytest.approx(again, rel=1e-4)
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_a_run_that_fails_does_not_lose_the_others(tmp_path: Path) -> None:
    folder = kept_in(tmp_path, "average", "last", 0).with_suffix("")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("not ours")
    with pytest.raises(HdlError, match="1 of 2 runs failed; average, last, seed 0: .*logs"):
        list(run_side_by_side(tmp_path, ["average"], Setting(2, 4, 2), [0], at_once=2))
    assert kept_in(tmp_path, "average", "average", 0).exists()
