"""What a run's launches depend on, and the data they read instead; attention itself is held to a dense mask in
tests/o1/test_attention.py and, through cuDNN, in test_fused.py and test_graphs.py."""

import pytest
import torch

from hdl.kernels import attention
from hdl.kernels.attention import MAX_WASTE, CudnnAttention, Frame
from hdl.o1.layout import Layout, Segment, lay_out
from tests.kernels.helpers import DEVICE, draw

SHORT, LONG = Segment(20, 30, 34), Segment(390, 26, 39)


def frame_of(*segments: Segment) -> Frame:
    return Frame.of(lay_out(list(segments)), exact=False)


def test_a_frame_has_room_for_little_more_than_its_run() -> None:
    for segments in ([SHORT], [LONG], [SHORT, LONG, SHORT], [LONG] * 9, [Segment(2, 1, 1)]):
        layout = lay_out(segments)
        frame = Frame.of(layout, exact=False)
        assert frame.serves(layout)
        assert layout.tokens <= frame.tokens <= layout.tokens * (1 + 1 / attention.STEPS)
        assert frame.tail == (frame.tokens > layout.tokens) and frame.samples == len(segments)


@pytest.mark.parametrize(
    ("segments", "served"),
    [
        ([LONG, SHORT], True),
        ([SHORT, SHORT], False),  # wastes too much
        ([Segment(380, 26, 39), SHORT], True),
        ([Segment(470, 26, 39), SHORT], False),  # too many
        ([Segment(205, 26, 39), Segment(205, 30, 34)], True),
        ([Segment(1000, 20, 39), Segment(2, 20, 34)], False),  # too long a text
        ([LONG, Segment(10, 30, 17), Segment(10, 30, 17)], False),  # too many samples
    ],
)
def test_whom_a_frame_serves(segments: list[Segment], served: bool) -> None:
    frame = frame_of(SHORT, LONG)
    assert frame.tail
    layout = lay_out(segments)
    assert frame.serves(layout) == served
    if served:
        assert frame.tokens <= layout.tokens * (1 + MAX_WASTE)


def test_a_frame_without_a_tail_serves_its_number_of_tokens_alone() -> None:
    frame = frame_of(Segment(160, 32, 32))
    assert frame.tokens == 1184 and not frame.tail
    assert frame.serves(lay_out([Segment(160, 16, 64)]))
    assert not frame.serves(lay_out([Segment(159, 32, 32)]))


def test_an_exact_frame_serves_its_own_layout_alone() -> None:
    frame = Frame.of(lay_out([SHORT, LONG]), exact=True)
    assert frame.serves(lay_out([SHORT, LONG])) and not frame.serves(lay_out([LONG, SHORT]))


def numbers(sequences: attention.Sequences) -> list[list[int]]:
    """Starts and lengths of the queries, then of the keys."""
    return [
        tensor.flatten().tolist()
        for tensor in (
            sequences.query_starts[:-1], sequences.query_lengths, sequences.key_starts[:-1], sequences.key_lengths
        )
    ]  # fmt: skip


def test_starts_and_lengths_follow_the_layout() -> None:
    layout: Layout = lay_out([Segment(60, 9, 10), Segment(40, 14, 10)])
    framed = CudnnAttention(Frame.of(layout, exact=False), DEVICE)
    assert framed.frame.tokens == 336
    framed.load(layout)
    places = framed.gen.query_starts.data_ptr()
    assert numbers(framed.gen) == [[59, 189, 330], [91, 141, 6], [0, 150, 330], [150, 180, 6]]
    assert numbers(framed.ar) == [[0, 150], [59, 39], [0, 150], [59, 39]]
    framed.load(lay_out([Segment(59, 9, 10), Segment(40, 10, 14)]))
    assert numbers(framed.gen) == [[58, 188, 329], [91, 141, 7], [0, 149, 329], [149, 180, 7]]
    assert framed.gen.query_starts.data_ptr() == places, "captured launches read them where they were"
    exact = CudnnAttention(Frame.of(layout, exact=True), DEVICE)
    exact.load(layout)
    assert numbers(exact.gen) == [[59, 189], [91, 141], [0, 150], [150, 180]]


@pytest.mark.parametrize("width", [16, 24])
def test_text_gradients_are_added_where_text_is(width: int) -> None:
    layout = lay_out([Segment(5, 2, 3), Segment(2, 1, 1), Segment(7, 1, 2)])
    run = CudnnAttention(Frame.of(layout, exact=False), DEVICE)
    run.load(layout)
    dk, dv, text_dk, text_dv = (draw(layout.tokens, width, seed=i).bfloat16() for i in range(4))
    text = layout.token_types() == 0
    for unwritten in (text_dk, text_dv):
        unwritten[~text.to(DEVICE)] = torch.nan
    expected = [torch.where(text.to(DEVICE)[:, None], a + b, a) for a, b in ((dk, text_dk), (dv, text_dv))]
    run.add_text(dk, dv, text_dk, text_dv)
    assert torch.equal(dk, expected[0]) and torch.equal(dv, expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's attention needs a GPU")
def test_backward_repeats_itself_when_pytorch_is_told_to(request: pytest.FixtureRequest) -> None:
    layout = lay_out([Segment(160, 32, 32)]).to(DEVICE)
    run = CudnnAttention(Frame.of(layout, exact=False), DEVICE)
    run.load(layout)
    q, dout = (draw(run.frame.tokens, 32, 128, seed=i).bfloat16() for i in range(2))
    k, v = (draw(run.frame.tokens, 8, 128, seed=i).bfloat16() for i in (2, 3))
    out = torch.empty_like(q).flatten(-2)
    saved = run.forward(q, k, v, out)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = run.backward(dout.flatten(-2), q, k, v, out, saved)
    for _ in range(5):
        again = run.backward(dout.flatten(-2), q, k, v, out, saved)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
