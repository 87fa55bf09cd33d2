"""summary.html of a run: what it measured, drew and saved, on one page.

The page is whole in itself: style, charts (SVG), pictures (JPEG in data URLs) and the few lines of script of the
pictures' slider are in the one file, and its own policy forbids the browser to fetch anything.
"""

import base64
import io
import math
import re
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from hdl.data.shards import write_durably
from hdl.errors import HdlError
from hdl.report.chart import COLOURS, line_chart, number
from hdl.report.record import Curve, Record, SkippedStep, read_record
from hdl.survey.html import STYLE, counted, folded, left_out, section, table, text

FILE = "summary.html"
GRIDS = 24  # pictures in the page
WIDEST, TALLEST = 1600, 16000  # px of one; browsers have a bound of their own not far above
QUALITY = 88  # of JPEG
ROWS = 100  # skipped steps that are listed

# Is better. Of the other metrics, what a change or a distance from the training pictures is worth is for the reader to say.
HIGHER = ("style/with", "style/gate", "style/score")
LOWER = ("style/without", "drift", "held_out/", "held_out_ema/")
METRICS = ("style/", "drift", "held_out/", "held_out_ema/", "memorization", "change")
NOISY = ("loss", "grad_norm", "x0_error", "speed/")  # are smoothed
SHARES = "data/share/"  # of the sources, together in one chart
FIRST, LAST = ("training", "x0_error", "metrics", "held_out"), ("data", "speed", "memory", "save")


def write_summary(folder: Path) -> Path:
    """Write FILE into a run's folder, finished or not, in one piece; where it is.

    HdlError when the folder is no run's, holds something that is not a run's, or cannot be written to.
    """
    html = summary_page(read_record(folder))
    path = folder / FILE
    try:
        write_durably(path, html.encode())
    except OSError as error:
        raise HdlError(f"{path} could not be written ({error}); the run itself is untouched") from None
    return path


def summary_page(record: Record) -> str:
    """The whole page."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Run summary · {text(record.folder.name)}</title>
<style>{STYLE}{SUMMARY_STYLE}</style>
</head>
<body>
<header>
<p class="kind">Run summary</p>
<h1>{text(record.folder.name)}</h1>
{key_numbers(record)}
</header>
<main>
{adapter_section(record)}{metric_section(record.curves)}{picture_section(record.pictures)}\
{curve_section(record.curves)}{skip_section(record.skipped)}\
{section("config", "Config", f"<pre>{text(record.config)}</pre>")}</main>
<footer>hdl {text(version("hdl"))}</footer>
</body>
</html>
"""


# --- the sections


def key_numbers(record: Record) -> str:
    first, last = (f"{when:%Y-%m-%d %H:%M}" for when in (record.first, record.last))
    of = f" of {record.planned:,}" if record.planned and record.planned != record.done else ""
    numbers = {"steps": f"{record.done:,}{of}"}
    if record.trigger:
        numbers["trigger"] = text(record.trigger)
    numbers["date, UTC"] = (
        first if first == last else f"{first} – {last[11:] if first[:10] == last[:10] else last}"
    )
    return (
        '<dl class="numbers">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items())
        + "</dl>"
    )


def adapter_section(record: Record) -> str:
    if not record.adapters:
        return section("adapter", "Adapter", "<p>None yet: it is there when the run has ended.</p>")
    rows = []
    for what, folder in record.adapters.items():
        told = record.best if what == "best" else {}
        words = ", ".join(
            f"{text(name)} {text(number(value) if isinstance(value, (int, float)) else str(value))}"
            for name, value in told.items()
        )
        rows.append(
            f"<tr><td class=name>{what}</td><td><code>{text(str(folder))}</code></td><td>{words}</td></tr>"
        )
    return section("adapter", "Adapter", table("", rows))


def metric_section(curves: dict[str, Curve]) -> str:
    rows = [
        f"<tr><td>{text(tag)}</td>{_cell(curve, min(curve))}{_cell(curve, *best_of(tag, curve))}"
        f"{_cell(curve, max(curve))}</tr>"
        for tag, curve in sorted(curves.items())
        if tag.startswith(METRICS)
    ]
    if not rows:
        return section("metrics", "Metrics", "<p>None were measured.</p>")
    head = (
        "<tr><th></th>" + "".join(f"<th class=n>{word}</th>" for word in ("first", "best", "last")) + "</tr>"
    )
    return section("metrics", "Metrics", table(head, rows))


def best_of(tag: str, curve: Curve) -> tuple[int | None, str]:
    """The first step at which it was best, and a sign for which way that is; no step where neither way is better."""
    finite = {step: value for step, value in curve.items() if math.isfinite(value)}
    if finite and tag in HIGHER:
        return max(finite, key=finite.__getitem__), "↑ "
    if finite and tag.startswith(LOWER):
        return min(finite, key=finite.__getitem__), "↓ "
    return None, ""


def _cell(curve: Curve, step: int | None, sign: str = "") -> str:
    if step is None:
        return "<td class=n>–</td>"
    value = f"{curve[step]:.4g}"
    return f"<td class=n>{sign}{value}<br><span class=quiet>step {step:,}</span></td>"


def picture_section(pictures: dict[int, Path]) -> str:
    """The grids over time. Without a script they stand one below another; with it, a slider shows one of them."""
    if not pictures:
        return section("pictures", "Pictures", "<p>None were drawn.</p>")
    figures = "".join(_figure(step, pictures[step]) for step in spread(list(pictures), GRIDS))
    slider = (
        '<label id="when" hidden><input type="range" min="0" step="1" aria-label="which pictures" /> '
        "<output></output></label>"
    )
    count = f'<p class="quiet">{GRIDS} of {len(pictures):,} are shown.</p>' if len(pictures) > GRIDS else ""
    return section("pictures", "Pictures", f"{slider}{figures}{count}<script>{SLIDER}</script>")


def spread(steps: list[int], most: int) -> list[int]:
    """At most so many of them: the first, the last, and evenly between."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _figure(step: int, path: Path) -> str:
    name = f"after {counted(step, 'step')}"
    try:
        data = base64.b64encode(jpeg(path)).decode()
        shown = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
    except (OSError, SyntaxError):  # SyntaxError is what Pillow raises for some broken PNGs
        shown = f"<div class=gone>{text(path.name)} is not readable as a picture</div>"
    return f'<figure class=grid id="step-{step:06d}"><figcaption>{name}</figcaption>{shown}</figure>'


def jpeg(path: Path) -> bytes:
    """The picture, made smaller where it is wider or taller than a page has use for."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((WIDEST, TALLEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def curve_section(curves: dict[str, Curve]) -> str:
    if not curves:
        return section("curves", "Curves", "<p>There are none yet.</p>")
    groups: dict[str, dict[str, dict[str, Curve]]] = {}
    for tag in sorted(curves, key=lambda tag: (tag != "loss", tag)):
        group, chart, word = place(tag)
        groups.setdefault(group, {}).setdefault(chart, {})[word] = curves[tag]
    parts = []
    for group in sorted(groups, key=_order):
        charts = [
            line_chart(title, dict(few), smooth=title.startswith(NOISY))
            for title, lines in groups[group].items()
            for few in batched(list(lines.items()), COLOURS)
        ]
        parts.append(f"<h3>{text(group)}</h3><div class=charts>{''.join(charts)}</div>")
    return section("curves", "Curves", "".join(parts))


def place(tag: str) -> tuple[str, str, str]:
    """Where a curve is drawn: under which heading, in which chart, by what word in its legend."""
    if band := re.fullmatch(r"(.+)/sigma_([\d.]+)-([\d.]+)", tag):
        return band[1].split("/")[0], f"{band[1]} by sigma", f"{band[2]} – {band[3]}"
    if tag.startswith(SHARES):
        return "data", SHARES.rstrip("/"), tag.removeprefix(SHARES)
    if "/" in tag:
        return tag.split("/")[0], tag, tag
    return "metrics" if tag.startswith(METRICS) else "training", tag, tag


def _order(group: str) -> tuple[int, str]:
    if group in FIRST:
        return FIRST.index(group), ""
    if group in LAST:
        return len(FIRST) + 1 + LAST.index(group), ""
    return len(FIRST), group


def batched(items: list[tuple[str, Curve]], most: int) -> list[list[tuple[str, Curve]]]:
    return [items[i : i + most] for i in range(0, len(items), most)]


def skip_section(skipped: list[SkippedStep]) -> str:
    if not skipped:
        return section("skipped", "Skipped steps", "<p>None: every step was taken.</p>")
    rows = [
        f"<tr><td class=n>{skip.step:,}</td><td>{text(skip.why)}"
        + folded(counted(len(skip.samples), "sample"), f"<pre>{text(chr(10).join(skip.samples))}</pre>", True)
        + "</td></tr>"
        for skip in skipped[:ROWS]
    ]
    head = "<tr><th class=n>step</th><th>why it was not taken</th></tr>"
    return section("skipped", "Skipped steps", table(head, rows) + left_out(len(skipped), ROWS, "steps"))


# --- what the page is made of


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

SLIDER = """
const grids = [...document.querySelectorAll(".grid")], when = document.querySelector("#when"), range = when.firstChild;
const show = i => {
  grids.forEach((grid, k) => grid.hidden = k !== i);
  range.value = i;
  when.querySelector("output").textContent = grids[i].firstChild.textContent;
};
const linked = () => {
  const i = grids.findIndex(grid => "#" + grid.id === location.hash);
  show(i < 0 ? grids.length - 1 : i);
};
range.max = grids.length - 1;
range.oninput = () => show(+range.value);
addEventListener("hashchange", linked);
document.querySelector("#pictures").classList.add("sliding");
when.hidden = grids.length < 2;
linked();
"""

SUMMARY_STYLE = """
:root { --c0: #4a83b8; --c1: #cc7a2d; --c2: #4f9d60; --c3: #b5559a; --c4: #8a75cc; --c5: #a8922c; --c6: #3b9fa6;
  --c7: #c75a52; }
.chart svg path { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; pointer-events: none; }
.chart svg path.raw { stroke-width: 1; opacity: 0.3; }
.chart svg circle { pointer-events: none; }
.chart text.y { text-anchor: end; }
.chart figcaption { margin: 0 0 4px; font-size: 13px; }
.chart figcaption span { display: inline; font-size: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; padding: 0; list-style: none; font-size: 12px;
  color: var(--quiet); overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
.n .quiet { font-size: 12px; }
td.n, th.n { padding-left: 16px; }
.grid { margin: 0 0 24px; }
.grid img { display: block; max-width: 100%; border-radius: 4px; }
.sliding .grid figcaption { display: none; }
#when { display: flex; align-items: center; gap: 16px; margin-bottom: 12px; font-variant-numeric: tabular-nums; }
#when[hidden], .grid[hidden] { display: none; }
#when input { flex: 1; max-width: 480px; accent-color: var(--bar); }
""" + "".join(
    f".chart path.c{c}, .chart circle.c{c} {{ stroke: var(--c{c}); }} .chart circle.c{c} {{ fill: var(--c{c}); }} "
    f".legend i.c{c} {{ background: var(--c{c}); }}\n"
    for c in range(COLOURS)
)
