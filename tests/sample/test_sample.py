from pathlib import Path

import pytest
import torch

from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.sample.generate import Request, SamplerSettings, generate
from hdl.sample.grid import as_tensor, picture_grid
from hdl.sample.schedulers import DEV_TIMESTEPS, UniPC

SETTINGS = {
    "full": SamplerSettings("full", steps=4, guidance_scale=5.0, shift=3.0),
    "dev": SamplerSettings("dev", steps=4, guidance_scale=5.0, shift=3.0),
}


@pytest.mark.parametrize("variant", ["full", "dev"])
def test_a_picture_does_not_depend_on_what_else_is_drawn(tiny_base: Path, variant: str) -> None:
    checkpoint = open_checkpoint(tiny_base)
    model, encoder = load_model(checkpoint, "cpu", torch.float32), PromptEncoder(checkpoint)
    empty = encoder.embed(encoder.ids(UNCONDITIONAL_PROMPT))
    sizes = [(64, 96), (32, 32), (64, 96)]
    prompts = ["a red ball", "a boat on the sea at night", "a red ball"]
    requests = [
        Request(encoder.embed(encoder.ids(p)), height, width, seed)
        for seed, (p, (height, width)) in enumerate(zip(prompts, sizes))
    ]
    together = generate(model, requests, empty, SETTINGS[variant], "cpu")
    for request, picture in zip(requests, together):
        assert picture.shape == (request.height, request.width, 3) and picture.dtype == torch.uint8
        alone = generate(model, [request], empty, SETTINGS[variant], "cpu")[0]
        assert (picture.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[2])  # same prompt, another seed


def test_unipcs_grid_is_shifted_twice() -> None:
    assert UniPC(50, 3.0).timesteps[:3] == [999, 993, 986]
    assert UniPC(10, 3.0).timesteps == [999, 964, 922, 874, 818, 749, 666, 562, 428, 249]
    assert len(DEV_TIMESTEPS) == 28


def test_a_grid_holds_every_picture_and_its_label() -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], dtype=torch.uint8)
    pictures = [c.expand(32, 64, 3) for c in colours]
    sheet = as_tensor(picture_grid([pictures[:2], pictures[2:]], ["left", "right"], ["one", "two"]))
    seen = {tuple(pixel) for pixel in sheet.flatten(0, 1).tolist()}
    assert {tuple(c) for c in colours.tolist()} <= seen

    def relabelled(columns: list[str], labels: list[str]) -> torch.Tensor:
        other = as_tensor(picture_grid([pictures[:2], pictures[2:]], columns, labels))
        return (other != sheet).any(-1).any(-1).nonzero().flatten()  # which lines of pixels changed

    assert relabelled(["left", "right"], ["one", "two"]).numel() == 0
    first, second = (
        relabelled(["left", "right"], ["uno", "two"]),
        relabelled(["left", "right"], ["one", "due"]),
    )
    assert relabelled(["here", "right"], ["one", "two"]).max() < first.min() and first.max() < second.min()


def test_a_long_label_is_wrapped_not_cut() -> None:
    picture = [torch.zeros(64, 64, 3, dtype=torch.uint8)]
    short, long = (picture_grid([picture], ["x"], ["word " * n]) for n in (1, 40))
    assert long.width == short.width and long.height > short.height
