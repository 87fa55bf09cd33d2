import pytest
import torch

from hdl.o1.layout import Segment, lay_out


def test_positions_of_a_small_run() -> None:
    layout = lay_out([Segment(text=3, rows=1, cols=2), Segment(text=2, rows=2, cols=1)])
    t, h, w = layout.positions.tolist()
    assert t == [0, 1, 2, 4096, 4096, 0, 1, 4096, 4096]
    assert h == [0, 1, 2, 4096, 4096, 0, 1, 4096, 4097]
    assert w == [0, 1, 2, 4096, 4097, 0, 1, 4096, 4096]
    assert layout.token_types().tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert layout.time_index.tolist() == [2, 6]


def test_order_puts_every_embedding_in_its_place() -> None:
    layout = lay_out([Segment(3, 1, 2), Segment(2, 1, 1)])
    text, time, patches = ["a", "b", "tms", "c", "tms"], ["T0", "T1"], ["p0", "p1", "q0"]
    rows = text + time + patches
    assert [rows[i] for i in layout.order] == ["a", "b", "T0", "p0", "p1", "c", "T1", "q0"]


def test_segments_of_one_shape_form_one_group() -> None:
    layout = lay_out([Segment(3, 2, 2), Segment(5, 1, 1), Segment(3, 1, 4)])
    assert sorted(group.index.tolist() for group in layout.groups) == [
        [[0, 1, 2, 3, 4, 5, 6], [13, 14, 15, 16, 17, 18, 19]],
        [[7, 8, 9, 10, 11, 12]],
    ]
    covered = torch.cat([group.index.flatten() for group in layout.groups]).sort().values
    assert torch.equal(covered, torch.arange(layout.tokens))


@pytest.mark.parametrize("segment", [Segment(1, 1, 1), Segment(4, 0, 1), Segment(5000, 1, 1)])
def test_impossible_segments_are_refused(segment: Segment) -> None:
    with pytest.raises(ValueError, match="text"):
        lay_out([segment])
    with pytest.raises(ValueError, match="at least one"):
        lay_out([])
