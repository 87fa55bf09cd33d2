"""The head and its loss without a prediction, against autograd through the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hdl.kernels import head_loss
from hdl.kernels.head_loss import errors_in_place, head_errors
from hdl.o1.patches import PATCH_DIM, to_model
from tests.kernels.helpers import DEVICE, distance

D = 40  # small: what is tested is the width of a patch, 3072


@pytest.fixture(params=["kernel", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the kernel and on the plain formula."""
    if request.param == "plain":
        monkeypatch.setattr(head_loss, "runs_triton", lambda tensor: False)
    return request.param


class Case:
    """A head, hidden states, pixels, and the gradient that comes back for each patch's error."""

    def __init__(self, patches: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(patches, D, generator=g).to(DEVICE, dtype)
        self.weight = (torch.randn(PATCH_DIM, D, generator=g) * 0.1).to(DEVICE, dtype)
        self.bias = (torch.randn(PATCH_DIM, generator=g) * 0.3).to(DEVICE, dtype)
        pixels = torch.randint(0, 256, (patches, PATCH_DIM), generator=g, dtype=torch.uint8)
        pixels[0, :100], pixels[-1, -100:] = 0, 255
        self.pixels = pixels.to(DEVICE)
        self.incoming = torch.randn(patches, generator=g).to(DEVICE)

    def ours(self, chunk: int = 4096) -> tuple[Tensor, Tensor]:
        hidden = self.hidden.detach().requires_grad_()
        errors = head_errors(hidden, self.weight, self.bias, self.pixels, chunk)
        (gradient,) = torch.autograd.grad(errors, hidden, self.incoming)
        return errors.detach(), gradient

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x_pred in `dtype` through autograd; errors in float64 where that is the dtype, else float32."""
        hidden = self.hidden.detach().to(dtype).requires_grad_()
        x_pred = F.linear(hidden, self.weight.to(dtype), self.bias.to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x0 = self.pixels.to(wide) / 127.5 - 1.0
        errors = (x_pred.to(wide) - x0).square().mean(-1)
        (gradient,) = torch.autograd.grad(errors, hidden, self.incoming.to(wide))
        return errors.detach(), gradient


@pytest.mark.parametrize(("patches", "chunk"), [(1, 4), (3, 4), (4, 4), (5, 4), (9, 4), (3, 1), (5, 4096)])
def test_errors_and_gradient_of_every_patch(patches: int, chunk: int) -> None:
    case = Case(patches)
    (errors, gradient), (true_errors, true_gradient) = case.ours(chunk), case.plain(torch.float64)
    assert errors.dtype == torch.float32 and gradient.dtype == torch.float32
    for i in range(patches):
        assert distance(errors[i], true_errors[i]) < 1e-5
        assert distance(gradient[i], true_gradient[i]) < 1e-5


def test_bfloat16_is_no_further_from_the_truth_than_plain_bfloat16() -> None:
    case = Case(7, torch.bfloat16)
    true, plain, ours = case.plain(torch.float64), case.plain(torch.bfloat16), case.ours(4)
    assert ours[1].dtype == torch.bfloat16 and ours[0].dtype == torch.float32
    for mine, theirs, exact in zip(ours, plain, true):
        assert distance(mine, exact) <= 1.5 * distance(theirs, exact) < 0.1


def test_hidden_and_pixels_of_any_strides() -> None:
    case = Case(6)
    expected = case.ours()
    wide = torch.zeros(6, D + 8, device=DEVICE)
    wide[:, 8:] = case.hidden
    pixels = torch.zeros(6, PATCH_DIM + 16, dtype=torch.uint8, device=DEVICE)
    pixels[:, 16:] = case.pixels
    for hidden, seen in [(wide[:, 8:], pixels[:, 16:]), (case.hidden.t().contiguous().t(), case.pixels)]:
        case.hidden, case.pixels = hidden, seen
        assert not (hidden.is_contiguous() and seen.is_contiguous())
        errors, gradient = case.ours(4)
        assert distance(errors, expected[0].double()) < 1e-6
        assert distance(gradient, expected[1].double()) < 1e-6
    case.pixels = case.pixels.t().contiguous().t()
    assert distance(case.ours()[0], expected[0].double()) < 1e-6


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    case = Case(5)
    errors = head_errors(case.hidden, case.weight, case.bias, case.pixels, 2)
    assert not errors.requires_grad
    assert distance(errors, case.plain(torch.float64)[0]) < 1e-5
    with torch.no_grad():
        again = head_errors(case.hidden.requires_grad_(), case.weight, case.bias, case.pixels, 2)
    assert torch.equal(errors, again)


def test_what_is_kept_is_one_matrix_of_hiddens_size() -> None:
    case = Case(5)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        head_errors(case.hidden.requires_grad_(), case.weight, case.bias, case.pixels)
    assert [t.shape for t in kept] == [case.hidden.shape]


def test_a_second_backward_gives_the_same() -> None:
    case = Case(3)
    hidden = case.hidden.requires_grad_()
    total = head_errors(hidden, case.weight, case.bias, case.pixels).sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_over_the_prediction(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x_pred = torch.randn(3, PATCH_DIM, generator=generator).to(DEVICE, dtype)
    pixels = torch.tensor([0, 255, 128], dtype=torch.uint8).repeat(3, PATCH_DIM // 3).to(DEVICE)
    difference = x_pred.double() - (pixels.double() / 127.5 - 1)
    untouched = x_pred.clone()
    errors = errors_in_place(x_pred, pixels, leave_difference=False)
    assert torch.equal(x_pred, untouched)
    assert torch.allclose(errors.double(), difference.square().mean(-1), rtol=1e-6)
    assert torch.equal(errors_in_place(x_pred, pixels, leave_difference=True), errors)
    rounding = 0.5 * torch.finfo(dtype).eps  # once; the rest is float32's own
    assert bool(((x_pred - difference).abs() <= rounding * difference.abs() + 2.5e-7).all())


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_that_is_trained_is_refused(part: str) -> None:
    case = Case(2)
    getattr(case, part).requires_grad_()
    with pytest.raises(ValueError, match="frozen head"):
        head_errors(case.hidden, case.weight, case.bias, case.pixels)


def test_x0_is_the_models(path: str) -> None:
    """A head that predicts every pixel's value exactly makes no error."""
    case = Case(4)
    weight = torch.zeros_like(case.weight)
    pixels = case.pixels[:1].expand(4, -1)
    errors = head_errors(case.hidden, weight, to_model(case.pixels[0]), pixels)
    assert float(errors.max()) < 1e-13
