"""Replayed steps give what plain ones give, to the bit, whatever comes in between."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hdl.adapter.flat import FLAT
from hdl.flow.loss import X0Error
from hdl.kernels import gemm, graphs
from hdl.kernels.fuse import fuse
from hdl.o1.layout import Layout, Segment, lay_out
from hdl.o1.patches import PATCH_DIM
from tests.kernels.test_fused import SMALL, adapted_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

ONE, OTHER = [Segment(9, 4, 3)], [Segment(5, 2, 3), Segment(7, 3, 3)]
LARGE = [Segment(20, 60, 50)]


@pytest.fixture(autouse=True)
def always_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which algorithm wins a race may differ between two models, and with it the order of sums."""
    monkeypatch.setattr(gemm, "measure", False)


@pytest.fixture
def pair() -> tuple[PeftModel, PeftModel]:
    """The same model twice: one to replay, one for plain steps."""
    models = adapted_model(SMALL, torch.bfloat16), adapted_model(SMALL, torch.bfloat16)
    for model in models:
        fuse(model)
    graphs_of(models[1])._enabled = False
    return models


def graphs_of(model: PeftModel) -> graphs.Graphs:
    return model.get_base_model().forward.__self__


def step(model: PeftModel, layout: Layout, seed: int, add: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    patches = len(layout.patch_index)
    text = torch.randn(
        len(layout.text_index), SMALL.hidden_size, device="cuda", generator=generator
    ).bfloat16()
    z = torch.randn(patches, PATCH_DIM, device="cuda", generator=generator).bfloat16()
    t = torch.rand(len(layout.segments), device="cuda", generator=generator)
    pixels = torch.randint(256, (patches, PATCH_DIM), device="cuda", generator=generator).to(torch.uint8)
    weight = torch.rand(patches, device="cuda", generator=generator)
    flat = model.get_parameter(FLAT)
    if not add:
        flat.grad = None
    errors = model(text, z, t, layout, measure=X0Error(pixels))
    (errors * weight).sum().backward()
    assert flat.grad is not None
    return errors.detach(), flat.grad


def test_replays_equal_plain_steps(
    pair: tuple[PeftModel, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying, plain = pair
    for number, segments in enumerate(
        [ONE, ONE, ONE, OTHER, ONE, OTHER, OTHER, ONE, LARGE, LARGE, LARGE, ONE]
    ):
        layout = lay_out(segments).to("cuda")
        errors, gradient = step(replaying, layout, number)
        expected_errors, expected_gradient = step(plain, layout, number)
        assert torch.equal(errors, expected_errors), number
        assert torch.equal(gradient, expected_gradient), number
        for model in pair:  # an optimizer step
            model.get_parameter(FLAT).data.add_(gradient, alpha=-0.5)
    assert set(graphs_of(replaying)._captured) == {tuple(ONE), tuple(OTHER)}
    assert not graphs_of(plain)._captured


def test_gradients_accumulate(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, _ = pair
    layout = lay_out(ONE).to("cuda")
    singles = [step(replaying, layout, seed)[1].clone() for seed in range(4)]
    step(replaying, layout, 2)
    _, total = step(replaying, layout, 3, add=True)
    assert torch.equal(total, singles[2] + singles[3])


def test_the_oldest_graph_goes_first(
    pair: tuple[PeftModel, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying, _ = pair
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    layouts = [lay_out([Segment(5, n, 2)]).to("cuda") for n in (1, 2, 3)]
    for layout in layouts:
        for seed in range(3):
            step(replaying, layout, seed)
    assert list(graphs_of(replaying)._captured) == [layouts[1].segments, layouts[2].segments]


def test_drawing_between_steps_changes_nothing(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, plain = pair
    layout = lay_out(ONE).to("cuda")
    for seed in range(3):
        step(replaying, layout, seed)
    z = torch.randn(12, PATCH_DIM, device="cuda").bfloat16()
    text = torch.randn(9, SMALL.hidden_size, device="cuda").bfloat16()
    with torch.no_grad(), replaying.disable_adapter():
        replaying(text, z, torch.rand(1, device="cuda"), layout)
    after = step(replaying, layout, 5)
    expected = step(plain, layout, 5)
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])
