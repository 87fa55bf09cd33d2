"""Three things taught side by side: any of them in any picture, and told apart."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdl.errors import HdlError
from hdl.mini.scenes import paint
from hdl.mini.style import is_styled
from hdl.mini.taught import (
    CHARACTER,
    LOOK,
    TAG,
    TRIGGERS,
    Shown,
    evaluation_scenes,
    paint_taught,
    read_picture,
    write_set,
)

ALL = [Shown(*bits) for bits in product((False, True), repeat=3)]


def test_a_picture_is_read_as_it_was_meant_even_through_noise() -> None:
    rng = np.random.default_rng(0)
    for scene in evaluation_scenes(10):
        assert np.array_equal(paint_taught(scene, Shown()), paint(scene))
        for shown in ALL:
            noisy = paint_taught(scene, shown) + rng.normal(0, 30, (128, 128, 3))
            assert read_picture(noisy.clip(0, 255).astype(np.uint8), scene) == shown
        assert [is_styled(paint_taught(scene, shown)) for shown in ALL] == [shown.look for shown in ALL]


@pytest.mark.parametrize("what", [LOOK, CHARACTER, TAG])
def test_the_trigger_stands_where_it_shows_and_nowhere_else(tmp_path: Path, what: str) -> None:
    write_set(tmp_path / "set", what, taught=6, plain=8, seed=1)
    styles = json.loads((tmp_path / "set" / "styles.json").read_text())
    assert sorted(styles.values()) == sorted([what] * 6 + ["plain"] * 8)
    evaluated = {scene.things for scene in evaluation_scenes(50)}
    for name, style in styles.items():
        words = (tmp_path / "set" / name).with_suffix(".txt").read_text()
        picture = np.asarray(Image.open(tmp_path / "set" / name)).astype(int)
        assert words.startswith(f"{TRIGGERS[what]}, ") == (style == what)
        assert is_styled(picture.astype(np.uint8)) == (style == LOOK)
        heart = np.abs(picture[22:32, 90:102] - (214, 48, 44)).sum(-1).mean() < 60
        assert heart == (style == TAG)
        assert "yellow fish" not in words  # kept for evaluation
    assert all(thing.colour == "yellow" and thing.kind == "fish" for (thing,) in evaluated)
    with pytest.raises(HdlError, match="not empty"):
        write_set(tmp_path / "set", what, taught=1, plain=1)
