"""Drift against its definition, written out for one prompt."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hdl.adapter.lora import attach
from hdl.config import Lora
from hdl.engine.processes import Processes
from hdl.flow.noise import VARIANTS
from hdl.metrics.drift import LEVELS, Drift
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import patchify
from hdl.o1.prompt import PromptEncoder
from hdl.sample.generate import Request

BASE = Path(__file__).parents[2] / "hdl" / "mini" / "o1-mini"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is there to gather from."""
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [mine])


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(open_checkpoint(BASE))


def adapted(strength: float) -> PeftModel:
    model = attach(load_model(open_checkpoint(BASE), "cpu", torch.float32), Lora(rank=4), "", 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=strength, generator=torch.Generator().manual_seed(len(name)))
    return model


def requests(encoder: PromptEncoder, *prompts: str) -> list[Request]:
    return [Request(encoder.embed(encoder.ids(p)), 64, 96, seed) for seed, p in enumerate(prompts)]


def drift_of(encoder: PromptEncoder, model: PeftModel, *prompts: str, processes: Processes | None = None):  # type: ignore[no-untyped-def]
    without, asking = (
        requests(encoder, *prompts),
        requests(encoder, *(f"kotonia style, {p}" for p in prompts)),
    )
    here = processes or Processes(0, 1, torch.device("cpu"))
    return Drift(without, asking, here, VARIANTS["full"], torch.float32).measure(model)


def test_a_fresh_adapter_moves_nothing(encoder: PromptEncoder) -> None:
    found = drift_of(encoder, adapted(0.0), "a house")
    assert found.drift == found.change == found.relative == 0.0
    assert found.drift_by_band == (0.0,) * 4


def test_it_is_what_it_says(encoder: PromptEncoder) -> None:
    model, (request,) = adapted(0.05), requests(encoder, "a small red house")
    found = drift_of(encoder, model, "a small red house")

    noise = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(request.seed + 1))[0]
    eps = patchify(noise.permute(1, 2, 0))
    layout = lay_out([Segment(len(request.text), 2, 3)])
    x, squares = torch.zeros(6, 3072), []
    model.eval()
    with torch.no_grad():
        for i in range(LEVELS):
            sigma = 1 - (2 * i + 1) / (2 * LEVELS)
            z, t = (1 - sigma) * x + sigma * 8.0 * eps, torch.tensor([1 - sigma])
            with model.disable_adapter():
                x = model(request.text.float(), z, t, layout)
            squares.append((model(request.text.float(), z, t, layout) - x).square().mean())
    expected = torch.stack(squares)
    assert found.drift == pytest.approx(float(expected.mean().sqrt()), rel=1e-4)
    bands = expected.flip(0).view(4, 2).mean(dim=1).sqrt().tolist()
    assert list(found.drift_by_band) == pytest.approx(bands, rel=1e-4)
    assert found.change > 0 and found.relative == found.drift / found.change


def test_it_leaves_the_model_as_it_was(encoder: PromptEncoder) -> None:
    model = adapted(0.05).train()
    drift_of(encoder, model, "a house")
    assert model.training
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def test_prompts_are_averaged_and_shared_out(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(0.05)
    prompts = ["a house", "a fish at the sea", "a tree"]
    whole = drift_of(encoder, model, *prompts)
    parts: dict[int, object] = {}
    for rank in (1, 0):  # rank 0 last: it then sees what both have

        def gather(self: Processes, mine: object) -> list[object]:
            parts[self.rank] = mine
            return [parts[0], parts[1]] if len(parts) == 2 else [mine, mine]

        monkeypatch.setattr(Processes, "gather", gather)
        found = drift_of(encoder, model, *prompts, processes=Processes(rank, 2, torch.device("cpu")))
    assert found.drift == pytest.approx(whole.drift, rel=1e-6)
    assert found.change == pytest.approx(whole.change, rel=1e-6)
