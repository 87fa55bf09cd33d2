"""What is measured on pictures: scores, and the distance from what was trained on."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_bit import BitImageProcessor

from hdl.data.mixture import Mixture, Source
from hdl.data.prepare import Options, prepare
from hdl.data.shards import Shards
from hdl.errors import HdlError
from hdl.metrics.memorization import nearest_distance, training_patches
from hdl.metrics.scores import open_score
from hdl.mini.style_set import write_style_set
from hdl.o1.patches import patchify, unpatchify

BASE = Path(__file__).parents[2] / "hdl" / "mini" / "o1-mini"
CPU = torch.device("cpu")


def flat(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "encoder")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_an_encoders_score_is_the_nearness_to_the_references(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "look").mkdir()
    flat((250, 10, 10)).save(tmp_path / "look" / "a.png")
    flat((240, 20, 10)).save(tmp_path / "look" / "b.jpg")
    (tmp_path / "look" / "notes.txt").write_text("no picture")
    score = open_score(str(encoder), tmp_path / "look", CPU)
    near, far = score(flat((245, 15, 10))), score(flat((10, 30, 240)))
    assert far < near <= 1.0 + 1e-6
    assert near > 0.99


def test_a_function_of_the_users_is_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_measure.py").write_text(
        "def redness(picture):\n    return picture.getpixel((0, 0))[0] / 255\n\n\ndef silent(picture):\n    pass\n\n\n"
        "def broken(picture):\n    raise ValueError('no mouth in it')\n\n\nCONSTANT = 3\n\n\n"
        "def exact(picture):\n    import numpy\n    return numpy.float32(0.5)\n\n\n"
        "def lost(picture):\n    return float('nan')\n"
    )
    Path("my_mistake.py").write_text("def f(:\n")
    assert open_score("my_measure:exact", None, CPU)(flat((0, 0, 0))) == 0.5
    assert open_score("my_measure:redness", None, CPU)(flat((51, 0, 0))) == pytest.approx(0.2)
    with pytest.raises(HdlError, match="returned None; expected a finite number"):
        open_score("my_measure:silent", None, CPU)(flat((0, 0, 0)))
    with pytest.raises(HdlError, match="returned nan; expected a finite number"):
        open_score("my_measure:lost", None, CPU)(flat((0, 0, 0)))
    with pytest.raises(HdlError, match=r"my_measure:broken.*ValueError.*no mouth in it"):
        open_score("my_measure:broken", None, CPU)(flat((0, 0, 0)))
    for wrong, said in (
        ("my_measure:CONSTANT", "is no function"), ("my_measure:nothing", "cannot be imported"),
        ("nowhere:f", "cannot be imported"), ("my_mistake:f", "cannot be imported"), (":f", "cannot be imported"), ("my_measure", "neither the folder of an image encoder nor a function"),
    ):  # fmt: skip
        with pytest.raises(HdlError, match=said):
            open_score(wrong, None, CPU)
    assert "" not in sys.path[:1] or sys.path.count("") == 1


def test_what_an_encoder_lacks_is_named(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(HdlError, match="needs validation.style_references"):
        open_score(str(encoder), None, CPU)
    with pytest.raises(HdlError, match="no such folder"):
        open_score(str(encoder), tmp_path / "nowhere", CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HdlError, match="no picture there"):
        open_score(str(encoder), tmp_path / "empty", CPU)
    with pytest.raises(HdlError, match="no image encoder loads"):
        open_score(str(tmp_path / "empty"), tmp_path / "empty", CPU)
    (tmp_path / "empty" / "a.png").write_bytes(b"torn")
    with pytest.raises(HdlError, match="a.png is not readable"):
        open_score(str(encoder), tmp_path / "empty", CPU)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("styled")
    write_style_set(folder / "images", 4, 2)
    prepare(folder / "images", folder / "shards", BASE, options=Options(area=128))
    return Mixture([Source("taught", Shards(folder / "shards"))])


def test_a_picture_out_of_the_training_set_is_at_no_distance(mixture: Mixture) -> None:
    patches = training_patches(mixture)
    assert patches.shape == (6 * 16, 3072) and patches.dtype == torch.uint8
    copied = unpatchify(patches[16:32].flip(0), 4, 4)  # a training picture's patches in another order
    assert nearest_distance([copied], patches, CPU) == 0.0


def test_the_distance_is_that_of_the_nearest(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdl.metrics.memorization.CHUNK", 7)
    patches = training_patches(mixture)
    drawn = torch.randint(0, 256, (64, 96, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    difference = (patchify(drawn).double()[:, None] - patches.double()[None]) / 127.5
    expected = difference.square().mean(dim=-1).sqrt().amin(dim=1).mean()
    assert nearest_distance([drawn], patches, CPU) == pytest.approx(float(expected), rel=1e-5)


def test_a_large_set_is_looked_at_in_parts(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdl.metrics.memorization.MOST_PATCHES", 40)
    assert len(training_patches(mixture)) == 32  # every third of six pictures
