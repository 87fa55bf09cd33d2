"""The scenes a small O1 learns from: the same from the same seed, and captions that say what is there."""

import numpy as np
import pytest

from hdl.mini import captions, shapes
from hdl.mini.captions import caption, loose_caption, names
from hdl.mini.scenes import PAIRS, PLACES, Look, Scene, Thing, held_out, imagine, imagine_held_out, paint
from hdl.mini.style import TRIGGER
from hdl.o1.patches import PATCH_DIM, patchify


def drawn(seed: int) -> tuple[np.ndarray, str, Scene]:
    rng = np.random.default_rng(seed)
    scene = imagine(rng)
    return paint(scene), loose_caption(scene, rng), scene


def test_same_seed_same_picture_and_caption() -> None:
    for seed in range(20):
        first, second = drawn(seed), drawn(seed)
        assert np.array_equal(first[0], second[0]) and first[1:] == second[1:]
    assert len({drawn(seed)[1] for seed in range(20)}) == 20


def test_pictures_are_rgb_of_128() -> None:
    picture = drawn(0)[0]
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8


def test_captions_name_every_fact() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = imagine(rng)
        words = caption(scene, rng)
        for thing in scene.things:
            assert names(words, f"{thing.colour} {thing.kind}"), words
            assert any(names(words, phrase) for phrase in captions.PLACES[thing.place]), words
            assert any(names(words, size) for size in captions.SIZES[thing.size]), words
        assert any(phrase in words for phrase in captions.SETTINGS[scene.setting]), words
        if scene.look.tone:
            assert any(phrase in words for phrase in captions.TONES[scene.look.tone]), words
        if scene.look.frame:
            assert names(words, f"{scene.look.frame} frame") or names(words, f"{scene.look.frame} border"), (
                words
            )


def test_captions_do_not_name_a_look_that_is_not_there() -> None:
    rng = np.random.default_rng(0)
    phrases = [
        p
        for table in (captions.TONES, captions.OUTLINES, captions.SURFACES)
        for ps in table.values()
        for p in ps
    ]
    for _ in range(100):
        words = caption(imagine(rng, ordinary=True), rng)
        assert not any(phrase in words for phrase in phrases), words


def test_pretraining_never_meets_the_trigger() -> None:
    assert all(TRIGGER.split()[0] not in drawn(seed)[1] for seed in range(500))


def test_one_fact_changed_changes_the_picture() -> None:
    scene = Scene((Thing("boat", "red", "small", "left"),), "sea")
    others = [
        Scene((Thing("car", "red", "small", "left"),), "sea"),
        Scene((Thing("boat", "blue", "small", "left"),), "sea"),
        Scene((Thing("boat", "red", "big", "left"),), "sea"),
        Scene((Thing("boat", "red", "small", "right"),), "sea"),
        Scene((Thing("boat", "red", "small", "left"),), "snow"),
        *[
            Scene(scene.things, scene.setting, Look(**{part: value}))
            for part, value in (
                ("tone", "sepia"),
                ("tone", "dim"),
                ("outline", "dark"),
                ("surface", "shaded"),
                ("surface", "watercolour"),
                ("light", "vignette"),
                ("frame", "red"),
            )
        ],
    ]
    for other in others:
        assert np.abs(paint(scene).astype(int) - paint(other)).max() > 30, other


def test_training_scenes_leave_out_what_evaluation_asks_for() -> None:
    rng = np.random.default_rng(0)
    assert not any(held_out(imagine(rng)) for _ in range(300))
    assert all(held_out(imagine_held_out(rng)) for _ in range(50))


@pytest.mark.parametrize("kind", shapes.THINGS)
def test_every_thing_fits_its_window_with_its_outline(kind: str) -> None:
    for size in shapes.RADIUS:
        mask = shapes.halo(kind, size)[..., 0]
        assert mask.max() == 1.0
        assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) < 0.1


def test_two_things_never_touch() -> None:
    for first, second in PAIRS:
        distance = np.abs(np.subtract(PLACES[first], PLACES[second]))
        assert distance.max() >= shapes.WINDOW


def test_a_linear_head_can_draw_the_scenes() -> None:
    """Every patch the model predicts lies in a space of `hidden` dimensions; 256 of them must do well."""
    import torch

    rng = np.random.default_rng(0)
    pictures = [torch.from_numpy(paint(imagine(rng))) for _ in range(250)]
    patches = torch.cat([patchify(picture) for picture in pictures]).float() / 127.5 - 1
    shown, fresh = patches[: 200 * 16], patches[200 * 16 :]
    torch.manual_seed(0)
    basis = torch.pca_lowrank(shown, q=256, niter=1)[2]
    assert basis.shape == (PATCH_DIM, 256)
    off_centre = fresh - shown.mean(0)
    error = (off_centre - off_centre @ basis @ basis.T).square().mean()
    assert 10 * torch.log10(4 / error) > 30  # decibels; colours span 2
