"""Replayed steps give what plain ones give, to the bit, whatever comes in between."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hdl.adapter.flat import FLAT
from hdl.flow.loss import X0Error
from hdl.kernels import fuse, gemm, graphs
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import PATCH_DIM
from tests.kernels.test_fused import SMALL, adapted_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

ONE, OTHER = [Segment(9, 4, 3)], [Segment(5, 2, 3), Segment(7, 3, 3)]
# 330 tokens, of which a frame takes 336; and two that fit it, with 328 and 334
MANY = [Segment(60, 9, 10), Segment(40, 14, 10)]
FEWER, MORE = [Segment(58, 9, 10), Segment(40, 10, 14)], [Segment(60, 10, 9), Segment(44, 14, 10)]


@pytest.fixture(autouse=True)
def always_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which algorithm wins a race may differ between two models, and with it the order of sums."""
    monkeypatch.setattr(gemm, "measure", False)


@pytest.fixture(params=["full", "fp8", "fp8_once", "fp8_stored"])
def pair(request: pytest.FixtureRequest) -> tuple[PeftModel, PeftModel]:
    """The same model twice: one to replay, one for plain steps."""
    models = adapted_model(SMALL, torch.bfloat16), adapted_model(SMALL, torch.bfloat16)
    for model in models:
        fuse.fuse(model, weights=request.param)
    graphs_of(models[1])._enabled = False
    return models


def graphs_of(model: PeftModel) -> graphs.Graphs:
    found = fuse.graphs_of(model)
    assert found
    return found


def tokens_of(model: PeftModel) -> list[int]:
    return [captured.frame.tokens for captured in graphs_of(model).captured]


class Step:
    """One step's random numbers."""

    def __init__(self, segments: list[Segment], seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.layout = lay_out(segments).to("cuda")
        patches = len(self.layout.patch_index)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        self.text = draw(len(self.layout.text_index), SMALL.hidden_size).bfloat16()
        self.z = draw(patches, PATCH_DIM).bfloat16()
        self.t = torch.rand(len(segments), device="cuda", generator=generator)
        pixels = torch.randint(256, (patches, PATCH_DIM), device="cuda", generator=generator)
        self.pixels = pixels.to(torch.uint8)
        self.weight = torch.rand(patches, device="cuda", generator=generator)

    def errors(self, model: PeftModel) -> Tensor:
        return model(self.text, self.z, self.t, self.layout, measure=X0Error(self.pixels))

    def take(self, model: PeftModel, add: bool = False) -> tuple[Tensor, Tensor]:
        """Errors of the patches, and the flat parameter's gradient."""
        flat = model.get_parameter(FLAT)
        if not add:
            flat.grad = None
        errors = self.errors(model)
        (errors * self.weight).sum().backward()
        assert flat.grad is not None
        return errors.detach(), flat.grad.clone()


def assert_equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_replays_equal_plain_steps(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, plain = pair
    for number, segments in enumerate([ONE, ONE, OTHER, ONE, OTHER, OTHER, ONE]):
        step = Step(segments, number)
        got = step.take(replaying)
        assert_equal(got, step.take(plain))
        for model in pair:  # an optimizer step
            model.get_parameter(FLAT).data.add_(got[1], alpha=-0.5)
    assert len(tokens_of(replaying)) == 2
    assert not graphs_of(plain).captured


def test_one_graph_serves_all_that_fit_its_frame(pair: tuple[PeftModel, PeftModel]) -> None:
    """Rows that belong to no sample change nothing: products of more rows round alike."""
    replaying, plain = pair
    for number, segments in enumerate([MANY, FEWER, MORE, MANY]):
        step = Step(segments, number)
        (errors, gradient), (exact_errors, exact_gradient) = step.take(replaying), step.take(plain)
        assert tokens_of(replaying) == [336]
        torch.testing.assert_close(errors, exact_errors, rtol=2e-2, atol=0.0)
        assert (gradient - exact_gradient).norm() < 2e-2 * exact_gradient.norm()


def test_too_different_a_size_gets_a_graph_of_its_own(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, _ = pair
    Step(MANY, 0).take(replaying)
    Step([Segment(60, 9, 10), Segment(24, 14, 10)], 0).take(replaying)  # 314 tokens
    Step([Segment(330, 6, 1)], 0).take(replaying)  # 336, but one sample
    assert tokens_of(replaying) == [336, 320, 336]


def test_a_second_forward_before_the_first_ones_backward(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, _ = pair
    first, second = Step(ONE, 0), Step(ONE, 1)
    gradients = []
    for model in pair:
        first.take(model)
        model.get_parameter(FLAT).grad = None
        errors = first.errors(model), second.errors(model)
        (errors[0].sum() + 2 * errors[1].sum()).backward()
        gradients.append(model.get_parameter(FLAT).grad)
    assert torch.equal(*gradients)
    first.errors(replaying)  # let go without a backward: the next is replayed again
    assert (
        graphs_of(replaying)(torch.zeros(21, SMALL.hidden_size).to("cuda", torch.bfloat16), first.layout)
        is not None
    )


def test_gradients_accumulate(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, _ = pair
    singles = [Step(ONE, seed).take(replaying)[1] for seed in range(4)]
    Step(ONE, 2).take(replaying)
    _, total = Step(ONE, 3).take(replaying, add=True)
    assert torch.equal(total, singles[2] + singles[3])


def test_the_longest_unused_graph_goes_first(
    pair: tuple[PeftModel, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying, _ = pair
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    for rows in (1, 2, 1, 3):
        Step([Segment(5, rows, 2)], 0).take(replaying)
    assert tokens_of(replaying) == [7, 11]


def test_drawing_between_steps_changes_nothing(pair: tuple[PeftModel, PeftModel]) -> None:
    replaying, plain = pair
    Step(ONE, 0).take(replaying)
    other = Step(OTHER, 7)
    with torch.no_grad(), replaying.disable_adapter():
        replaying(other.text, other.z, other.t, other.layout)
    step = Step(ONE, 5)
    assert_equal(step.take(replaying), step.take(plain))


def test_without_memory_for_graphs_steps_are_plain(
    pair: tuple[PeftModel, PeftModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replaying, plain = pair

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    Step(ONE, 0).take(replaying)
    monkeypatch.setattr(graphs, "Captured", out_of_memory)
    step = Step(OTHER, 1)
    assert_equal(step.take(replaying), step.take(plain))
    assert not graphs_of(replaying).captured  # what they held was given up first
    assert "not enough memory for CUDA graphs" in capsys.readouterr().out
