"""Text read once gives what reading it in every step gives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hdl.adapter.lora import attach
from hdl.config import Lora
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.decoder import O1
from hdl.o1.layout import Segment, lay_out
from hdl.sample.reading import predictor

MIXED = [Segment(9, 2, 3), Segment(2, 1, 1), Segment(14, 3, 2), Segment(9, 2, 3)]


@pytest.fixture(scope="module")
def model() -> O1:
    folder = Path(__file__).parents[1] / "golden" / "o1-tiny"
    return load_model(open_checkpoint(folder), "cpu", torch.float32)


def run_of(segments: list[Segment], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random text, z and t."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(sum(s.text for s in segments), dim, generator=generator) * 0.05
    z = torch.randn(sum(s.patches for s in segments), 3072, generator=generator) * 4
    return text, z, torch.rand(len(segments), generator=generator)


@pytest.mark.parametrize("segments", [MIXED, MIXED[:1] * 2, MIXED[1:2]], ids=["mixed", "alike", "least"])
def test_a_step_is_the_models(model: O1, segments: list[Segment]) -> None:
    text, z, t = run_of(segments, 64)
    layout = lay_out(segments)
    read = predictor(model, text, layout)
    for at in (t, 1 - t):  # what was read serves every time and noise
        with torch.no_grad():
            expected = model(text, z, at, layout)
        assert (read(z, at) - expected).norm() / expected.norm() < 2e-6
        z = -z


def test_the_adapter_reads_too(model: O1) -> None:
    adapted = attach(model, Lora(rank=4, targets=r".*(q|k|v|o|gate|up|down)_proj"), "", 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    text, z, t = run_of(MIXED, 64)
    layout = lay_out(MIXED)
    with torch.no_grad():
        on = adapted(text, z, t, layout)
        with adapted.disable_adapter():
            off = adapted(text, z, t, layout)
            read_off = predictor(adapted, text, layout)(z, t)
        read_on = predictor(adapted, text, layout)(z, t)
    assert (on - off).norm() / off.norm() > 0.05
    assert (read_on - on).norm() / on.norm() < 2e-6 and (read_off - off).norm() / off.norm() < 2e-6
    adapted.unload()


def test_steps_compute_no_text(model: O1) -> None:
    """The point of it: with a long prompt and a small picture a step is a fraction of the tokens."""
    segments = [Segment(300, 1, 1)]
    text, z, t = run_of(segments, 64)
    counted: list[int] = []
    hook = model.model.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: counted.append(inputs[0].shape[0])
    )
    read = predictor(model, text, lay_out(segments))
    for _ in range(3):
        read(z, t)
    hook.remove()
    assert counted == [299, 2, 2, 2]


def test_a_replaced_decoder_is_run_whole(model: O1, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may go around what somebody has put there."""
    text, z, t = run_of(MIXED, 64)
    layout = lay_out(MIXED)
    decoder = model.model.language_model
    plain = predictor(model, text, layout)(z, t)
    monkeypatch.setattr(decoder, "forward", lambda x, layout: 2 * type(decoder).forward(decoder, x, layout))
    doubled = predictor(model, text, layout)(z, t)
    with torch.no_grad():
        assert torch.equal(doubled, model(text, z, t, layout)) and not torch.allclose(doubled, plain)
