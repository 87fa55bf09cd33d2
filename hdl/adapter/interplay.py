"""Who changes whose pictures: every adapter alone, every pair and none, asked with every trigger, pair and none.

Two things are read off the pictures, all as mean absolute differences of pixels (0 to 255):
- what adapters that are on change in pictures asked for so (`change`): large where their own trigger is, and near 0
  elsewhere, if a trigger gates its adapter;
- what a second adapter changes in the pictures of a first that is asked for by its trigger (`disturbance`): near 0, if
  the two can be stacked.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean

from torch import Tensor

Some = tuple[str, ...]  # names of adapters: of those on, or of those asked for
Pictures = Mapping[tuple[Some, Some], Sequence[Tensor]]  # (on, asked) -> uint8 [H, W, 3] a prompt


def groups(names: Sequence[str]) -> list[Some]:
    """None, each alone, each pair."""
    return [group for size in (0, 1, 2) for group in combinations(names, size)]


def asking(prompt: str, asked: Some, triggers: Mapping[str, str]) -> str:
    """The prompt behind the triggers of those asked for."""
    return ", ".join([*(triggers[name] for name in asked), prompt])


def change(pictures: Pictures) -> dict[tuple[Some, Some], float]:
    """How much the adapters that are on change, for everything that was asked: against the same without adapters."""
    return {
        (on, asked): _distance(drawn, pictures[(), asked]) for (on, asked), drawn in pictures.items() if on
    }


def disturbance(pictures: Pictures) -> dict[tuple[str, str], float]:
    """(whose, by whom): how much the second, switched on too, changes pictures of the first asked for by its trigger."""
    return {
        (name, other): _distance(pictures[on, (name,)], pictures[(name,), (name,)])
        for on, asked in pictures
        if len(on) == 2 and not asked
        for name, other in (on, on[::-1])
    }


def table(values: Mapping[tuple[Some, Some], float], title: str) -> str:
    """A number for each (line, column), lines and columns in the order in which they come."""
    lines, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    first = max(len(title), *(len(label(line)) for line in lines)) + 2
    widths = [max(len(label(column)), 6) + 2 for column in columns]
    head = title.ljust(first) + "".join(label(c).rjust(w) for c, w in zip(columns, widths))
    rows = [
        label(line).ljust(first)
        + "".join(
            (f"{values[line, c]:.2f}" if (line, c) in values else "-").rjust(w)
            for c, w in zip(columns, widths)
        )
        for line in lines
    ]
    return "\n".join([head, *rows])


def label(some: Iterable[str]) -> str:
    return " + ".join(some) or "none"


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return fmean(float((a.float() - b.float()).abs().mean()) for a, b in zip(first, second))
