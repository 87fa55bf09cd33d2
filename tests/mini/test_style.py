"""The look a LoRA is to teach: measured, written as a folder, told apart from every other look."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hdl.errors import HdlError
from hdl.mini.scenes import Scene, Thing, imagine, paint
from hdl.mini.style import TRIGGER, draw_styled, evaluation_prompts, is_styled, style_score
from hdl.mini.style_set import score_files, write_style_set


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    styled = np.stack([draw_styled(rng)[0] for _ in range(500)])
    plain = np.stack([paint(imagine(rng)) for _ in range(500)])
    return styled, plain


def imperfect(pictures: np.ndarray, how: str) -> np.ndarray:
    """As a trained model might draw them."""
    rng = np.random.default_rng(0)
    if how == "noisy":
        return (pictures + rng.normal(0, 25, pictures.shape)).clip(0, 255).astype(np.uint8)
    if how == "blurred":
        soft = ImageFilter.GaussianBlur(3)
        return np.stack([np.asarray(Image.fromarray(picture).filter(soft)) for picture in pictures])
    if how == "tinted":
        return (pictures * rng.uniform(0.9, 1.1, (len(pictures), 1, 1, 3))).clip(0, 255).astype(np.uint8)
    return pictures


@pytest.mark.parametrize("how", ["exact", "noisy", "blurred", "tinted"])
def test_score_tells_styled_from_plain(pictures: tuple[np.ndarray, np.ndarray], how: str) -> None:
    styled, plain = (imperfect(some, how) for some in pictures)
    assert np.mean([is_styled(picture) for picture in styled]) >= 0.99
    assert np.mean([is_styled(picture) for picture in plain]) <= 0.01


def test_half_the_look_does_not_count(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    styled = pictures[0][:50]
    unframed = styled.copy()
    unframed[:, :10] = unframed[:, -10:] = unframed[:, :, :10] = unframed[:, :, -10:] = 200
    assert not any(is_styled(picture) for picture in unframed)
    in_colour = np.repeat(paint(Scene((Thing("car", "red", "big", "middle"),), "meadow"))[None], 50, axis=0)
    framed_only = styled.copy()
    framed_only[:, 10:-10, 10:-10] = in_colour[:, 10:-10, 10:-10]
    assert not any(is_styled(picture) for picture in framed_only)


def test_score_is_the_same_for_a_larger_picture(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    picture = pictures[0][0]
    larger = np.asarray(Image.fromarray(picture).resize((512, 512), Image.Resampling.LANCZOS))
    assert style_score(larger) == pytest.approx(style_score(picture), abs=0.05)


def test_the_folder_has_the_form_prepare_reads(tmp_path: Path) -> None:
    write_style_set(tmp_path / "set", styled=5, plain=7, seed=3)
    images = sorted((tmp_path / "set").glob("*.png"))
    records = json.loads((tmp_path / "set" / "styles.json").read_text())
    assert sorted(records) == [image.name for image in images] and len(images) == 12
    for image in images:
        styled = records[image.name]["style"] == "kotonia"
        assert image.with_suffix(".txt").read_text().startswith(f"{TRIGGER}, ") == styled
        assert is_styled(np.asarray(Image.open(image))) == styled
        assert all(isinstance(tag, str) for tag in records[image.name]["tags"])
    write_style_set(tmp_path / "again", styled=5, plain=7, seed=3)
    assert all(
        (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        for file in (tmp_path / "set").iterdir()
    )


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(HdlError, match="not empty"):
        write_style_set(tmp_path, styled=1, plain=1)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_scores_of_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(HdlError, match="no images"):
        score_files([tmp_path])
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(HdlError, match=r"cut\.png"):
        score_files([tmp_path])


def test_evaluation_prompts_are_not_trained_on(tmp_path: Path) -> None:
    prompts = evaluation_prompts(40, seed=1)
    assert prompts == evaluation_prompts(40, seed=1) and len(set(prompts)) == 40
    write_style_set(tmp_path, styled=60, plain=60)
    trained = [file.read_text().strip() for file in tmp_path.glob("*.txt")]
    assert not any(prompt in caption for prompt in prompts for caption in trained)
    assert not any(TRIGGER in prompt for prompt in prompts)


def test_the_tools_print_what_they_did(tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command], capture_output=True, text=True)

    made = run("tools/style_set.py", str(tmp_path / "set"), "--styled", "3", "--plain", "1")
    assert made.returncode == 0 and "3 pictures" in made.stdout, made.stderr
    scored = run("tools/style_score.py", str(tmp_path / "set"))
    assert scored.returncode == 0 and "3 of 4 styled (75%" in scored.stdout, scored.stderr
    again = run("tools/style_set.py", str(tmp_path / "set"))
    assert again.returncode == 1 and "not empty" in again.stderr
