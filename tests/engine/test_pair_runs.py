"""Training on pairs for editing, as a user would start it: it learns, on either path, mixed with ordinary images."""

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from hdl.data.prepare import Options, prepare
from tests.engine.conftest import Launch

# One noise level, so that the curve is not the levels' own.
STEADY = {"flow__sigma": "logit_normal", "flow__logit_std": 1e-3, "train__steps": 16, "save__every": 16}


@pytest.fixture(scope="module")
def edits(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edit-shards")
    prepare(write_edits(photos, tmp_path_factory.mktemp("edits")), out, tiny_base, options=Options(area=96))
    return out


def write_edits(photos: Path, folder: Path) -> Path:
    """Three pictures to be inverted, one of them from two references, and two ordinary ones."""
    for name in ("astronaut", "coffee", "chelsea"):
        with Image.open(photos / f"{name}.png") as photo:
            ImageOps.invert(photo.convert("RGB")).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("invert it")
        shutil.copy(photos / f"{name}.png", folder / f"{name}.ref1.png")
    shutil.copy(photos / "rocket.png", folder / "coffee.ref2.png")
    for name in ("rocket", "coins"):
        for suffix in (".png", ".txt"):
            shutil.copy(photos / (name + suffix), folder)
    return folder


def test_pairs_are_learnt_and_alike_on_the_fused_path_of_two_ranks(launch: Launch, edits: Path) -> None:
    options = {**STEADY, "data__shards": edits, "data__caption_dropout": 0.3, "data__held_out": 0.3}
    plain = launch("plain", validation__held_out_samples=4, **options)
    assert plain.status == 0, plain.printed
    assert "3 samples have reference images, for editing" in plain.printed
    loss = plain.curve("loss")
    assert len(loss) == 16
    assert sum(loss[i] for i in range(12, 17)) / 5 < 0.9 * sum(loss[i] for i in range(1, 4)) / 3, loss
    held_out = plain.curve("held_out/loss")
    assert held_out[16] != held_out[0]

    fused = launch("fused", 2, model__kernels="fused", validation__held_out_samples=4, **options)
    assert fused.status == 0, fused.printed
    assert fused.curve("loss") == pytest.approx(loss, rel=1e-4)
    assert fused.curve("held_out/loss") == pytest.approx(held_out, rel=1e-4)


def test_a_checkpoint_without_the_whole_tower_is_refused_before_a_weight_is_read(
    launch: Launch, edits: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """ComfyUI's single file lacks the deepstack's weights."""
    tensors = {
        name.removeprefix("model."): tensor
        for file in sorted(tiny_base.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if "deepstack_merger_list" not in name and name != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "o1.safetensors")
    run = launch(
        data__shards=edits,
        model__base=tmp_path / "o1.safetensors",
        model__config_from=tiny_base,
        train__steps=1,
    )
    assert run.status == 1 and "of the visual tower's tensors" in run.printed
    assert "use the published folder" in run.printed and not run.output.exists()
