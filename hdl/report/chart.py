"""Curves over steps as SVG, small enough for dozens of them in a page; nothing in them runs."""

import math
from bisect import bisect_right
from itertools import accumulate, pairwise

from hdl.report.record import Curve
from hdl.survey.html import text

POINTS = 500  # of a line, at most
DOTTED = 40  # points up to which each is marked
COLUMNS = 60  # that tell their values when pointed at
COLOURS = 8  # lines of a chart
WINDOWS = 30  # a smoothed line's mean is over this share of the points

LEFT, TOP, WIDTH, HEIGHT, FOOT = 58, 8, 422, 150, 38


def line_chart(title: str, lines: dict[str, Curve], smooth: bool) -> str:
    """A figure with up to COLOURS curves, as HTML.

    lines: a word on each curve -> at least one point. smooth: draw a moving mean over a pale line of each point.
    Values that are not finite are counted, not drawn.
    """
    drawn = {word: [(s, v) for s, v in line.items() if math.isfinite(v)] for word, line in lines.items()}
    missing = sum(map(len, lines.values())) - sum(map(len, drawn.values()))
    notes = [f"{missing:,} not finite, left out"] if missing else []
    parts: list[str] = []
    if points := [point for line in drawn.values() for point in line]:
        smooth = smooth and max(map(len, drawn.values())) > 2 * WINDOWS
        if smooth:
            notes.append("bold: moving mean")
        axes = Axes.around(points)
        parts = [axes.grid(), _columns(axes, drawn)]
        for c, line in enumerate(drawn.values()):
            if smooth:
                parts.append(_line(axes, line, f"raw c{c}") + _line(axes, moving_mean(line), f"c{c}"))
            else:
                parts.append(_line(axes, line, f"c{c}"))
    note = f" <span class=quiet>{'; '.join(notes)}</span>" if notes else ""
    legend = "".join(f"<li><i class=c{c}></i>{text(word)}</li>" for c, word in enumerate(lines))
    return (
        f"<figure class=chart><figcaption>{text(title)}{note}</figcaption>"
        f'<svg viewBox="0 0 {LEFT + WIDTH + 16} {TOP + HEIGHT + FOOT}" role="img" aria-label="{text(title)}">'
        f"{''.join(parts)}</svg>"
        + (f"<ul class=legend>{legend}</ul>" if len(lines) > 1 else "")
        + "</figure>"
    )


class Axes:
    """Where steps and values lie in the picture."""

    def __init__(self, first: float, last: float, low: float, high: float) -> None:
        self.first, self.last, self.low, self.high = first, last, low, high

    @classmethod
    def around(cls, points: list[tuple[int, float]]) -> "Axes":
        steps, values = zip(*points)
        first, last, low, high = min(steps), max(steps), min(values), max(values)
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(first, max(last, first + 1), low - room, high + room)

    def x(self, step: float) -> float:
        return LEFT + WIDTH * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return TOP + HEIGHT * (self.high - value) / (self.high - self.low)

    def grid(self) -> str:
        parts = []
        values = ticks(self.low, self.high, 5)
        digits = max(4, 2 + int(math.log10(max(map(abs, values)) / (values[1] - values[0]))))
        for value in values:
            y = self.y(value)
            parts.append(
                f'<line class=base x1={LEFT} x2={LEFT + WIDTH} y1="{y:.1f}" y2="{y:.1f}" />'
                f'<text class=y x={LEFT - 6} y="{y + 4:.1f}">{number(value, digits)}</text>'
            )
        for step in ticks(self.first, self.last, 6):
            if step == int(step):
                parts.append(f'<text x="{self.x(step):.1f}" y={TOP + HEIGHT + 14}>{number(step)}</text>')
        parts.append(f"<text class=axis x={LEFT + WIDTH // 2} y={TOP + HEIGHT + FOOT - 6}>step</text>")
        return "".join(parts)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, evenly spaced, at most so many and one."""
    least = (high - low) / most
    unit = 10 ** math.floor(math.log10(least))
    space = next(unit * round_one for round_one in (1, 2, 5, 10) if unit * round_one >= least * 0.999)
    return [i * space for i in range(math.ceil(low / space), math.floor(high / space) + 1)]


def number(value: float, digits: int = 4) -> str:
    """Rounded to so many digits, but whole numbers in full."""
    if abs(value) < 1e6 and value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def moving_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value's mean with its neighbours on both sides, so that it does not lag; at the ends, those there are."""
    reach = len(points) // WINDOWS // 2
    sums = [0.0, *accumulate(value for _, value in points)]
    means = []
    for i, (step, _) in enumerate(points):
        first, end = max(i - reach, 0), min(i + reach + 1, len(points))
        means.append((step, (sums[end] - sums[first]) / (end - first)))
    return means


def decimated(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS of them: the least and the greatest of each stretch, so that no spike is lost."""
    if len(points) <= POINTS:
        return points
    stretches = POINTS // 2 - 1
    middle, kept = points[1:-1], [points[0]]
    for i in range(stretches):
        stretch = middle[len(middle) * i // stretches : len(middle) * (i + 1) // stretches]
        least, greatest = (f(stretch, key=lambda point: point[1]) for f in (min, max))
        kept += sorted({least, greatest})
    return [*kept, points[-1]]


def _line(axes: Axes, points: list[tuple[int, float]], kind: str) -> str:
    if not points:
        return ""
    places = [f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in decimated(points)]
    path = f'<path class="{kind}" d="M{"L".join(places)}" />'
    if len(points) > DOTTED:
        return path
    dots = [f'<circle class="{kind}" r=2 cx="{x}" cy="{y}" />' for x, y in map(str.split, places)]
    return path + "".join(dots)


def _columns(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> str:
    """Over the whole chart, what the lines are at a step nearby, as titles of columns."""
    steps = sorted({step for line in lines.values() for step, _ in line})
    shown = sorted({steps[i * (len(steps) - 1) // (COLUMNS - 1)] for i in range(COLUMNS)})
    bounds = [axes.x(axes.first), *((axes.x(a) + axes.x(b)) / 2 for a, b in pairwise(shown))]
    parts = []
    for step, left, right in zip(shown, bounds, [*bounds[1:], axes.x(axes.last)]):
        words = [f"step {step:,}"]
        for word, line in lines.items():
            if at := bisect_right(line, (step, math.inf)):
                words.append(f"{word}: {number(line[at - 1][1])}")
        parts.append(
            f'<g><title>{text(chr(10).join(words))}</title><rect class=hit x="{left:.1f}" y={TOP} '
            f'width="{right - left:.1f}" height={HEIGHT} /></g>'
        )
    return "".join(parts)
