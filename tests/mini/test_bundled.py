"""The small O1 in the repository draws what a prompt says, and knows nothing of the style."""

from pathlib import Path

import numpy as np

from hdl.mini.captions import caption
from hdl.mini.gate import SETTINGS, measure_gate
from hdl.mini.scenes import imagine_held_out, paint
from hdl.sample.draw import draw_prompts

MINI = Path(__file__).parents[2] / "hdl" / "mini" / "o1-mini"


def test_it_fits_twelve_megabytes() -> None:
    assert (MINI / "model.safetensors").stat().st_size <= 12_000_000


def test_it_draws_pairs_of_thing_and_colour_that_it_never_saw() -> None:
    """The caption says all there is to draw, so the drawing can be held to the scene itself, pixel by pixel."""
    rng = np.random.default_rng(20261123)
    scenes = [imagine_held_out(rng) for _ in range(6)]
    drawn = draw_prompts(
        MINI, [caption(scene, rng) for scene in scenes], SETTINGS,
        seeds=range(6), height=128, width=128, together=6, device="cpu",
    )  # fmt: skip
    pictures = [np.asarray(drawing.image, np.float64) for drawing in drawn]
    errors = np.array([[((p - paint(s)) ** 2).mean() for s in scenes] for p in pictures])
    psnr = 10 * np.log10(255**2 / np.diag(errors))
    assert psnr.min() > 25, psnr
    assert psnr.mean() > 32, psnr
    assert (errors.argmin(axis=1) == np.arange(6)).all()  # every drawing is nearest to its own scene


def test_the_base_alone_draws_nothing_in_the_style(tmp_path: Path) -> None:
    gate = measure_gate(tmp_path, MINI, None, count=3, seed=1, device="cpu")
    assert (gate.with_trigger, gate.without_trigger) == (0.0, 0.0)
    assert len(list((tmp_path / "with-trigger").glob("*.png"))) == 3
    assert (tmp_path / "gate.png").is_file()
