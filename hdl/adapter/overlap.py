"""Do two adapters work in the same directions? The angles between their subspaces, linear by linear.

A reads from the space of its rows, B writes into the space of its columns. Between two subspaces of dimensions k and l
stand min(k, l) principal angles, whose cosines are the singular values of Q1^T Q2 for orthonormal bases Q1 and Q2
(Bjorck and Golub, 1973). The mean of their squares, ||Q1^T Q2||^2 / min(k, l), is 1 where one space lies in the other,
0 where they are orthogonal, and max(k, l) / n for random ones of n dimensions: adapters that leave each other alone
are near that. Adapters trained from the same seed start from the same A, and hardly leave it: rows that overlap much
where columns do not mean no more than this.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hdl.adapter.formats import Adapter
from hdl.adapter.names import place

CELL, MARGIN, LINE = 26, 10, 14  # pixels of the heat map
LETTER = 6  # about a letter's width in Pillow's built-in font


@dataclass(frozen=True)
class Overlap:
    """Mean squared cosines between two adapters of one linear, and what random subspaces would have."""

    rows: float
    columns: float
    rows_by_chance: float
    columns_by_chance: float


def overlaps(first: Adapter, second: Adapter) -> dict[str, Overlap]:
    """Of every linear that both adapt."""
    found = {}
    for module in sorted(first.pairs.keys() & second.pairs.keys()):
        one, two = first.pairs[module], second.pairs[module]
        rows, rows_by_chance = mean_squared_cosine(one.a.T, two.a.T)
        columns, columns_by_chance = mean_squared_cosine(one.b, two.b)
        found[module] = Overlap(rows, columns, rows_by_chance, columns_by_chance)
    return found


def mean_squared_cosine(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Between the spaces that the columns of [n, k] and [n, l] span, and its mean for random ones; 0 for no space."""
    q1, q2 = _basis(first), _basis(second)
    dims = q1.shape[1], q2.shape[1]
    if not min(dims):
        return 0.0, 0.0
    return float((q1.T @ q2).square().sum()) / min(dims), max(dims) / len(q1)


def _basis(vectors: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(vectors.double(), full_matrices=False)
    rounding = max(vectors.shape) * torch.finfo(vectors.dtype).eps
    return u[:, s > (s.max() if len(s) else 0) * rounding]


def overlap_table(found: dict[str, Overlap]) -> str:
    """Layers down, linears across: `rows/columns` in hundredths, and their means with chance beside them."""
    if not found:
        return overlap_summary(found)
    lines, columns = _axes(found)
    cells = {place(module): overlap for module, overlap in found.items()}
    width = max(len(c) for c in columns) + 1
    text = [" " * 14 + "".join(c.rjust(width) for c in columns)]
    for line in lines:
        row = [cells.get((line, column)) for column in columns]
        shown = (f"{100 * o.rows:.0f}/{100 * o.columns:.0f}" if o else "-" for o in row)
        text.append(line.ljust(14) + "".join(cell.rjust(width) for cell in shown))
    return "\n".join([*text, overlap_summary(found)])


def overlap_summary(found: dict[str, Overlap]) -> str:
    if not found:
        return "no linear in common"
    rows, columns, by_row, by_column = (
        100 * fmean(getattr(o, name) for o in found.values())
        for name in ("rows", "columns", "rows_by_chance", "columns_by_chance")
    )
    return f"rows {rows:.1f} % (chance {by_row:.1f}), columns {columns:.1f} % (chance {by_column:.1f})"


def overlap_map(by_pair: dict[str, dict[str, Overlap]]) -> Image.Image:
    """Heat maps side by side: a pair of adapters a row, the spaces of rows and of columns across; white is 0."""
    panels = [
        (f"{pair}: {space}", {place(m): getattr(o, space) for m, o in found.items()}, _axes(found))
        for pair, found in by_pair.items()
        for space in ("rows", "columns")
    ]
    left = max((LETTER * len(line) for _, _, (lines, _) in panels for line in lines), default=0) + MARGIN
    width = (
        left
        + max([CELL * len(c) for _, _, (_, c) in panels] + [LETTER * len(t) for t, *_ in panels])
        + MARGIN
    )
    heights = [2 * LINE + CELL * len(lines) + 7 * LETTER + MARGIN for _, _, (lines, _) in panels]
    sheet = Image.new("RGB", (2 * width, sum(heights[::2]) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, cells, (lines, columns)) in enumerate(panels):
        x, y = (i % 2) * width + left, sum(heights[: i - i % 2 : 2]) + MARGIN
        draw.text((x - left + MARGIN, y), title, fill="black")
        for c, column in enumerate(columns):
            draw.text((x + c * CELL, y + LINE), column[:4], fill="black")
        for r, line in enumerate(lines):
            top = y + 2 * LINE + r * CELL
            draw.text((x - left + MARGIN, top + CELL // 4), line, fill="black")
            for c, column in enumerate(columns):
                value = cells.get((line, column))
                shade = (225, 225, 225) if value is None else _shade(value)
                box = (x + c * CELL, top, x + (c + 1) * CELL - 2, top + CELL - 2)
                draw.rectangle(box, fill=shade)
                if value is not None:
                    draw.text((box[0] + 5, top + CELL // 4), f"{100 * value:.0f}", fill="black")
    return sheet


def _axes(found: dict[str, Overlap]) -> tuple[list[str], list[str]]:
    """Lines and columns of a table, decoder's layers in their order and what stands around them last."""
    places = [place(module) for module in found]
    lines = sorted({line for line, _ in places}, key=lambda n: (not n.startswith("layer "), len(n), n))
    return lines, sorted({column for _, column in places})


def _shade(value: float) -> tuple[int, int, int]:
    return 255, round(255 - 155 * value), round(255 - 225 * value)
