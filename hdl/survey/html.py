"""The small parts of the curation report: charts in SVG, tables, escaped text, and the page's one style sheet.

Everything returns HTML. Text that comes from files goes through `text`; other strings are put in as they are.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

NAMES = 1000  # file names of a list
LONGEST_TEXT = 240  # characters of a caption

SHAPES = {
    "<1:2": 1 / 2.5, "1:2": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0,
    "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0, ">2:1": 2.5,
}  # fmt: skip


def histogram(
    title: str,
    counts: list[int],
    labels: list[str],
    ranges: list[str],
    *,
    flagged: Callable[[int], bool] = lambda i: False,
    axis: str,
) -> str:
    """Bars of `counts`, side by side, as SVG.

    labels: one under each bar, or, one more, at the bars' bounds; ranges: what a bar counts, in words.
    flagged: whether bar i is one to look at.
    """
    width, top, height, foot = 480, 18, 130, 40
    wide = width / len(counts)
    most = max(max(counts), 1)
    parts = [f"<line class=base x1=0 x2={width} y1={top + height} y2={top + height} />"]
    for i, (count, words) in enumerate(zip(counts, ranges)):
        tall = max(height * count / most, 2) if count else 0
        x, y = i * wide, top + height - tall
        kind = "flagged" if flagged(i) else "bar"
        parts.append(
            f'<g><title>{text(words)}: {count:,}</title><rect class=hit x="{x:.1f}" y="0" width="{wide:.1f}" '
            f'height="{top + height}" /><rect class={kind} x="{x + 1:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" '
            f'height="{tall:.1f}" />'
        )
        if count:
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{y - 4:.1f}">{count:,}</text>')
        parts.append("</g>")
    shift = wide / 2 if len(labels) == len(counts) else 0
    for i, label in enumerate(labels):
        if label:
            parts.append(f'<text x="{i * wide + shift:.1f}" y="{top + height + 14}">{text(label)}</text>')
    parts.append(f'<text class=axis x="{width / 2}" y="{top + height + foot - 8}">{text(axis)}</text>')
    return (
        f'<figure class=chart><svg viewBox="-12 0 {width + 24} {top + height + foot}" role="img" '
        f'aria-label="{text(title)}">{"".join(parts)}</svg></figure>'
    )


def counts_between(values: Sequence[float], bounds: Sequence[float]) -> list[int]:
    """How many values lie below the first bound, from each to the next, and at or above the last."""
    counts = [0] * (len(bounds) + 1)
    for value in values:
        counts[sum(value >= bound for bound in bounds)] += 1
    return counts


def between(bounds: Sequence[float], unit: str) -> list[str]:
    """What `counts_between` counts, in words."""
    middle = [f"{low:g} to {high:g} {unit}" for low, high in pairwise(bounds)]
    return [f"below {bounds[0]:g} {unit}", *middle, f"{bounds[-1]:g} {unit} and more"] if bounds else ["all"]


def nearest_shape(aspect: float) -> str:
    """The name of the common shape nearest to width / height."""
    return min(SHAPES, key=lambda shape: abs(math.log(SHAPES[shape] / aspect)))


def outline(rows: int, cols: int) -> str:
    """The shape of a bucket, drawn."""
    scale = 22 / max(rows, cols)
    width, height = max(cols * scale, 1.5), max(rows * scale, 1.5)
    return (
        f'<svg class=outline viewBox="0 0 24 24"><rect x="{12 - width / 2:.1f}" y="{12 - height / 2:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" /></svg>'
    )


def bar_cells(count: int, most: int, flagged: bool) -> str:
    """Two cells of a table: a number, and a bar of its length."""
    kind = " flagged" if flagged else ""
    bar = f'<i class="rod{kind}" style="width:{100 * count / most:.1f}%"></i>'
    return f"<td class=n>{count:,}</td><td class=rods>{bar}</td>"


# --- tables and text


def text(words: str) -> str:
    """Any string, safe in HTML, also within quotes; bytes of a file name that are no UTF-8 become "?"."""
    return escape(words.encode("utf-8", "replace").decode())


def counted(count: int, noun: str, nouns: str = "") -> str:
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def shortened(words: str) -> str:
    return words if len(words) <= LONGEST_TEXT else words[:LONGEST_TEXT].rstrip() + " …"


def section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{title}</h2>{body}</section>\n'


def table(head: str, rows: list[str]) -> str:
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def folded(title: str, body: str, there: bool) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if there else ""


def left_out(count: int, shown: int, noun: str) -> str:
    return f'<p class="more">and {count - shown:,} more {noun}</p>' if count > shown else ""


def names(title: str, sources: list[str]) -> str:
    """File names to copy, a line each, folded away."""
    more = f"\n… and {len(sources) - NAMES:,} more lines" if len(sources) > NAMES else ""
    return folded(title, f"<pre>{text(chr(10).join(sources[:NAMES]).rstrip() + more)}</pre>", bool(sources))


def quotes(title: str, unit: str, rows: list[tuple[str, str, str]]) -> str:
    """Captions with a number before and their files behind."""
    body = [
        f"<tr><td class=n>{number}</td><td>{text(caption)}</td><td class=file>{text(source)}</td></tr>"
        for number, caption, source in rows
    ]
    head = f"<tr><th class=n>{unit}</th><th>caption</th><th>image</th></tr>"
    return f"<h3>{title}</h3>{table(head, body)}" if rows else ""


STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d2023; --quiet: #666c73; --line: #e2e2dd;
  --bar: #4a7196; --flag: #c07c2c; --link: #2b5d8c; --shade: #f1f1ed; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --card: #1d2023; --ink: #e6e5e1; --quiet: #989ea4;
  --line: #32363a; --bar: #7fa5c9; --flag: #d99a4e; --link: #93bbe0; --shade: #24282b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 20px; font-size: 30px; line-height: 1.2; font-weight: 600; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; font-weight: 600; }
h3 { margin: 24px 0 8px; font-size: 14px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 72ch; }
a { color: var(--link); }
section { margin-top: 48px; }
.kind, .quiet, .why, .more, footer { color: var(--quiet); }
.kind { margin: 0; font-size: 13px; }
.more { margin: 8px 0 0; font-size: 13px; }
.numbers { display: flex; flex-wrap: wrap; gap: 16px 40px; margin: 0; }
.numbers div { display: flex; flex-direction: column-reverse; }
.numbers dt { color: var(--quiet); font-size: 13px; }
.numbers dd { margin: 0; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.findings { margin-top: 32px; padding: 20px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.findings ul { margin: 0; padding: 0; list-style: none; }
.findings li { padding: 5px 0; }
.findings a { font-weight: 600; text-decoration: none; }
.findings a:hover { text-decoration: underline; }
.findings .why { margin-left: 6px; }
.findings p { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 24px 40px; }
.chart { margin: 8px 0 16px; max-width: 520px; }
.chart svg { display: block; width: 100%; }
.chart text { fill: var(--quiet); font-size: 11px; text-anchor: middle; font-variant-numeric: tabular-nums; }
.base { stroke: var(--line); }
.bar { fill: var(--bar); } .flagged { fill: var(--flag); } .hit { fill: transparent; }
g:hover .hit { fill: var(--shade); }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 16px; align-items: start; }
.strip .more { align-self: center; }
.strip figure { margin: 0; min-width: 0; }
.strip img, .gone { display: block; width: 100%; height: 120px; object-fit: contain; background: var(--shade);
  border-radius: 4px; }
.gone { line-height: 120px; text-align: center; color: var(--quiet); font-size: 12px; }
figcaption { margin-top: 4px; font-size: 12px; line-height: 1.35; }
figcaption span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.group { padding: 12px 0 20px; border-top: 1px solid var(--line); }
.group h3 { margin-top: 0; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { color: var(--quiet); font-size: 12px; font-weight: 400; text-align: left; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle; overflow-wrap: anywhere; }
.n { width: 1%; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.rods { width: 40%; min-width: 80px; }
.rod { display: block; height: 10px; min-width: 2px; background: var(--bar); border-radius: 1px; }
.rod.flagged { background: var(--flag); }
.minis { white-space: nowrap; padding-right: 0; text-align: right; }
.minis img { height: 36px; max-width: 64px; object-fit: cover; margin-left: 4px; vertical-align: middle;
  border-radius: 2px; }
.outline { display: block; width: 24px; height: 24px; }
.outline rect { fill: var(--shade); stroke: var(--quiet); }
.file { font-size: 12px; }
td.file { width: 32%; color: var(--quiet); }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--link); font-size: 13px; }
pre { max-height: 320px; overflow: auto; margin: 8px 0; padding: 12px; background: var(--shade); border-radius: 4px;
  font-size: 12px; }
footer { margin-top: 64px; font-size: 12px; }
"""
