"""Packed attention against the definition: a dense mask in float64."""

import pytest
import torch
from torch import Tensor

from hdl.o1.attention import packed_attention
from hdl.o1.layout import Layout, Segment, lay_out

SHAPES = [
    [Segment(5, 2, 3)],
    [Segment(2, 1, 1)],  # the shortest sample there is
    [Segment(40, 3, 3), Segment(40, 3, 3)],  # one shape: one dense batch
    [Segment(7, 2, 2), Segment(3, 4, 1), Segment(90, 1, 1), Segment(7, 1, 4)],  # mixed shapes
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Softmax attention with the mask written out: AR is causal, GEN sees its whole sample."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    sample = torch.cat([torch.full((s.tokens,), i) for i, s in enumerate(layout.segments)])
    order = torch.arange(layout.tokens)
    gen = layout.token_types() == 1
    allowed = (sample[:, None] == sample) & (gen[:, None] | (order[None] <= order[:, None]))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    assert weights.shape[0] == heads
    return torch.einsum("hij,jhd->ihd", weights, v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", SHAPES, ids=lambda s: f"{len(s)}x{s[0].text}")
def test_forward_and_backward_equal_the_dense_mask(
    segments: list[Segment], dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(len(segments))
    layout = lay_out(segments)
    shapes = [(layout.tokens, heads, 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64).to(dtype)

    exact = [x.double().requires_grad_() for x in inputs]
    expected = reference(*exact, layout)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())

    ours = [x.to(device).requires_grad_() for x in inputs]
    out = packed_attention(*ours, layout.to(device))
    grads = torch.autograd.grad(out, ours, upstream.to(device))

    bound = 2e-6 if dtype == torch.float32 else 1.2e-2
    for got, want in zip([out, *grads], [expected, *expected_grads]):
        error = (got.double().cpu() - want).norm() / want.norm()
        assert error < bound, float(error)


def test_a_sample_never_sees_its_neighbour() -> None:
    layout = lay_out([Segment(6, 2, 2), Segment(9, 1, 3)])
    q, k, v = (torch.randn(layout.tokens, heads, 16) for heads in (4, 2, 2))
    before = packed_attention(q, k, v, layout)
    first = layout.segments[0].tokens
    k[first:], v[first:] = 100.0, -100.0
    assert torch.equal(packed_attention(q, k, v, layout)[:first], before[:first])
