"""Drawing from reference images. That one picture's numbers are the model's own, the golden cases hold
(tests/o1/test_golden.py); here: several at once, guided, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdl.errors import HdlError
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.decoder import O1
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.o1.visual import VisualTower, side_seen, size_seen
from hdl.sample.generate import Request, SamplerSettings, generate
from hdl.sample.references import edit_request, read_reference

FULL = SamplerSettings("full", steps=3, guidance_scale=5.0, shift=3.0)
Tools = tuple[O1, PromptEncoder, VisualTower]


@pytest.fixture(scope="module")
def tools() -> Tools:
    checkpoint = open_checkpoint(Path(__file__).parents[1] / "golden" / "o1-tiny")
    model = load_model(checkpoint, "cpu", torch.float32)
    return model, PromptEncoder(checkpoint), VisualTower(checkpoint, "cpu", torch.float32)


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_pictures_with_and_without_references_share_a_run(tools: Tools) -> None:
    model, encoder, tower = tools
    empty = encoder.embed(encoder.ids(UNCONDITIONAL_PROMPT))
    two = edit_request(tower, encoder, "both at sea", [picture(96, 64, 1), picture(64, 64, 2)], 64, 96, 1)
    requests = [
        edit_request(tower, encoder, "at night", [picture(64, 96, 0)], 96, 64, 0),
        Request(encoder.embed(encoder.ids("a red ball")), 64, 64, 5),
        two,
    ]
    together = generate(model, requests, empty, FULL, "cpu")
    for request, drawn in zip(requests, together):
        alone = generate(model, [request], empty, FULL, "cpu")[0]
        whole = generate(model, [request], empty, FULL, "cpu", read_once=False)[0]
        assert drawn.shape == (request.height, request.width, 3)
        assert (drawn.int() - alone.int()).abs().max() <= 1 and (drawn.int() - whole.int()).abs().max() <= 1
    other = edit_request(tower, encoder, "both at sea", [picture(96, 64, 1), picture(64, 64, 3)], 64, 96, 1)
    swapped = edit_request(tower, encoder, "both at sea", [picture(64, 64, 2), picture(96, 64, 1)], 64, 96, 1)
    for changed in (other, swapped):  # every reference counts, and so does their order
        assert (generate(model, [changed], empty, FULL, "cpu")[0].int() - together[2].int()).abs().max() > 1


def test_an_edit_by_dev_is_plain_euler(tools: Tools) -> None:
    """No fresh noise between the steps: only one random number generator's first draw is used."""
    model, encoder, tower = tools
    empty = encoder.embed(encoder.ids(UNCONDITIONAL_PROMPT))
    dev = SamplerSettings("dev", 28, 0.0, 1.0)
    request = edit_request(tower, encoder, "at night", [picture(64, 64, 0)], 32, 32, 0)
    steps: list[int] = []
    drawn = generate(model, [request], empty, dev, "cpu", on_step=lambda: steps.append(1))[0]
    assert len(steps) == 28
    plain = generate(model, [replace(request, shown=None)], empty, dev, "cpu")[0]
    assert (drawn.int() - plain.int()).abs().max() > 1


def test_what_the_tower_sees() -> None:
    assert [side_seen(n) for n in (1, 4, 5, 8, 9)] == [384, 384, 288, 288, 192]
    assert size_seen((96, 64), 384) == (448, 288)
    assert size_seen((64, 64), 384) == (384, 384)
    assert size_seen((1600, 32), 192) == (1344, 32)  # never less than one token


def test_references_that_cannot_be_taken(tools: Tools, tmp_path: Path) -> None:
    _, encoder, tower = tools
    with pytest.raises(HdlError, match="11 reference images: expected 1 to 10"):
        edit_request(tower, encoder, "x", [picture(64, 64, 0)] * 11, 64, 64, 0)
    with pytest.raises(HdlError, match="a reference for 32x32 px: .* would have to fit"):
        edit_request(tower, encoder, "x", [picture(640, 64, 0)] * 3, 32, 32, 0)
    with pytest.raises(HdlError, match=r"the image's positions start at 4096, and it takes \d+; shorten it"):
        edit_request(tower, encoder, "word " * 4096, [picture(64, 64, 0)], 64, 64, 0)
    with pytest.raises(HdlError, match=r"gives? 2 <\|image_pad\|> for 1 reference images"):
        edit_request(tower, encoder, "a <|image_pad|> b", [picture(64, 64, 0)], 64, 64, 0)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(HdlError, match=r"reference .*bad.png: the content is damaged"):
        read_reference(tmp_path / "bad.png")


def test_a_checkpoint_without_all_of_the_tower(tmp_path: Path, tiny_base: Path) -> None:
    """ComfyUI's single file lacks the deepstack mergers."""
    checkpoint = open_checkpoint(tiny_base)
    checkpoint.entries = {n: e for n, e in checkpoint.entries.items() if "deepstack_merger_list" not in n}
    with pytest.raises(HdlError, match="lacks 12 of the visual tower's tensors .*use the published folder"):
        VisualTower(checkpoint, "cpu", torch.float32)
