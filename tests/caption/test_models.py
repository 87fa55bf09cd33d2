"""Captioning by a real, tiny vision-language model (Gemma 3's structure) on the CPU."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hdl.caption.models import LocalModel, cannot_load
from hdl.caption.question import picture
from hdl.caption.run import caption
from hdl.caption.settings import Settings
from hdl.errors import HdlError
from tests.caption.block_pictures import NAMES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU: in bfloat16 a batch may round otherwise than one image."""
    monkeypatch.setattr("hdl.caption.run.device_for", lambda local_rank: CPU)


def settings(tiny_vlm: Path, **more: object) -> Settings:
    return Settings.model_validate(
        {"model": str(tiny_vlm), "prompt": "Describe.", "max_new_tokens": 12, **more}
    )


def test_a_batch_says_what_each_image_gets_alone(images: Path, tiny_vlm: Path) -> None:
    model = LocalModel(settings(tiny_vlm), CPU)
    pictures = tuple(picture(images / name, 1024) for name in NAMES)
    prompts = ["Describe.", "What is it? Say it at length.", "A", "Describe."]  # so that padding is needed
    together = model.answer(pictures, prompts, seed=0)
    alone = [model.answer((p,), [prompt], seed=0)[0] for p, prompt in zip(pictures, prompts)]
    assert together == alone
    assert together[0] != together[3], "the model must see the pictures, or this test tells nothing"


def test_greedy_captions_of_a_folder_do_not_depend_on_the_batch(images: Path, tiny_vlm: Path) -> None:
    written = []
    for batch_size in (3, 1):
        summary = caption(images, settings(tiny_vlm, batch_size=batch_size, trigger="t"), overwrite=True)
        assert summary and len(summary.captions) == 4
        written.append(summary.captions)
        (images / ".captions.jsonl").unlink()  # so that the model is asked again
    assert written[0] == written[1]
    assert all(text.startswith("t, ") for text in written[0])


def test_drawn_captions_differ_and_come_again_by_seed(images: Path, tiny_vlm: Path) -> None:
    drawn = settings(tiny_vlm, captions_per_image=3, temperature=1.0, batch_size=6)
    first = caption(images, drawn)
    assert first and len(set(first.captions)) == 12
    assert (images / "a.2.txt").exists() and (images / "sub/d.1.txt").exists()
    (images / ".captions.jsonl").unlink()
    again = caption(images, drawn, overwrite=True)
    assert again and again.captions == first.captions


def test_an_answer_that_ends_by_itself_is_not_cut(images: Path, tiny_vlm: Path) -> None:
    model = LocalModel(settings(tiny_vlm, max_new_tokens=3), CPU)
    pictures = tuple(picture(images / name, 1024) for name in NAMES)
    assert all(answer.cut for answer in model.answer(pictures, ["A"] * 4, 0))
    model.ends = torch.arange(1000)  # whatever comes ends it
    assert not any(answer.cut for answer in model.answer(pictures, ["A"] * 4, 0))


def test_four_bits_on_a_cpu_are_refused(images: Path, tiny_vlm: Path) -> None:
    with pytest.raises(HdlError, match="--bits 4 needs a GPU"):
        caption(images, settings(tiny_vlm, bits=4))


def test_folders_that_are_no_such_model_are_named(tmp_path: Path, tiny_vlm: Path) -> None:
    def error(model: Path) -> str:
        with pytest.raises(HdlError) as raised:
            LocalModel(Settings(model=str(model)), CPU)
        return str(raised.value)

    assert "no such folder" in error(tmp_path / "nowhere")
    assert "no config.json there" in error(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded as an image-text-to-text model" in error(tmp_path)
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in tiny_vlm.iterdir():
        if file.name != "chat_template.jinja":
            (mute / file.name).write_bytes(file.read_bytes())
    assert "its processor has no chat_template" in error(mute)
    (mute / "chat_template.jinja").write_text("x")
    (mute / "model.safetensors").unlink()
    assert "cannot be loaded" in error(mute)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed here")
def test_gemma_4_without_torchvision_says_what_to_install(tmp_path: Path, tiny_vlm: Path) -> None:
    shutil.copytree(tiny_vlm, tmp_path / "gemma")
    processors = {
        "processor_class": "Gemma4Processor",
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        "image_processor": {"image_processor_type": "Gemma4ImageProcessor"},
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
    }
    (tmp_path / "gemma" / "processor_config.json").write_text(json.dumps(processors))
    with pytest.raises(HdlError, match=r"needs torchvision, .* pip install .* '\.\[caption\]'"):
        LocalModel(Settings(model=str(tmp_path / "gemma")), CPU)


def test_a_torchvision_for_another_torch_is_named_too() -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    assert "not the one that goes with torch" in str(cannot_load("gemma", error))
