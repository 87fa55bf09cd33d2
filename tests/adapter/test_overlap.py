"""Numbers on how adapters get along: subspaces of known angles, pictures of known differences."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hdl.adapter.formats import Adapter, Pair
from hdl.adapter.interplay import asking, change, disturbance, groups, table
from hdl.adapter.overlap import mean_squared_cosine, overlap_map, overlap_table, overlaps
from hdl.o1.checkpoint import open_checkpoint
from hdl.sample.grid import as_tensor
from tests.adapter.adapters import made_up


def turned(degrees: float) -> torch.Tensor:
    """A plane of R^4 that stands at this angle, once, to the plane of the first two axes."""
    angle = math.radians(degrees)
    return torch.tensor([[1.0, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]]).T


def test_principal_angles_are_those_of_geometry() -> None:
    for degrees in (0, 30, 60, 90):
        expected = (1 + math.cos(math.radians(degrees)) ** 2) / 2
        mixed = turned(degrees) @ torch.tensor([[2.0, 1.0], [-3.0, 0.5]])  # another basis of the same plane
        assert mean_squared_cosine(turned(0), mixed)[0] == pytest.approx(expected, abs=1e-6)
    line = torch.tensor([[3.0], [4.0], [0.0], [0.0]])
    assert mean_squared_cosine(line, turned(0))[0] == pytest.approx(1.0)  # it lies in the plane
    assert mean_squared_cosine(torch.zeros(4, 2), turned(0))[0] == 0.0  # an untrained B spans nothing


def test_random_subspaces_overlap_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        mean_squared_cosine(*(torch.randn(64, k, generator=generator) for k in (4, 8))) for _ in range(200)
    ]
    assert found[0][1] == 8 / 64
    assert sum(f for f, _ in found) / 200 == pytest.approx(8 / 64, rel=0.05)


def test_overlap_is_told_of_every_linear(tiny_base: Path) -> None:
    base = open_checkpoint(tiny_base)
    first, other = made_up(base, 1), made_up(base, 2)
    other = Adapter({m: p for m, p in other.pairs.items() if ".mlp." in m})
    same_rows = Adapter({m: replace(p, a=-2 * first.pairs[m].a) for m, p in other.pairs.items()})
    found = overlaps(first, same_rows)
    assert found.keys() == other.pairs.keys()
    assert all(o.rows == pytest.approx(1.0) and o.columns < 0.5 for o in found.values())
    text = overlap_table(found)
    assert "layer 3" in text and text.count("100/") == 4 * 3 and "rows 100.0 %" in text
    picture = as_tensor(overlap_map({"a, b": found}))
    assert (picture.float().std((0, 1)) > 0).all()
    nothing = overlaps(
        first, Adapter({"model.final_layer2.linear": Pair(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    )
    assert "no linear in common" in overlap_table(nothing)


def test_who_changes_whose_pictures() -> None:
    """Adapter a adds 10 where it is asked for; b adds 3 always: it has no gate, and disturbs a."""
    names = ["a", "b"]
    assert groups(["a", "b", "c"]) == [(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]
    assert asking("a boat", ("a", "b"), {"a": "kotonia style", "b": "pim"}) == "kotonia style, pim, a boat"
    grey = torch.full((4, 4, 3), 100, dtype=torch.uint8)
    pictures = {
        (on, asked): [grey + 10 * ("a" in on and "a" in asked) + 3 * ("b" in on)] * 2
        for on in groups(names)
        for asked in groups(names)
    }
    changes = change(pictures)
    assert changes[("a",), ("a",)] == 10 and changes[("a",), ()] == changes[("a",), ("b",)] == 0
    assert changes[("b",), ()] == changes[("b",), ("b",)] == 3 and changes[("a", "b"), ("a", "b")] == 13
    assert disturbance(pictures) == {("a", "b"): 3.0, ("b", "a"): 0.0}
    lines = table(changes, "on").splitlines()
    assert lines[0].split() == ["on", "none", "a", "b", "a", "+", "b"]
    assert lines[1].split() == ["a", "0.00", "10.00", "0.00", "10.00"]
