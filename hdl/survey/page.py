"""The curation report: one HTML page that says what to look at in a folder of images before training on it.

The page is whole in itself: style, charts (SVG) and thumbnails (WebP in data URLs) are in the one file, and no
script is. Everything listed is bounded, so a hundred thousand images make a page of three megabytes; what is
left out is counted.
"""

import base64
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

from hdl.data.buckets import PATCH
from hdl.data.images import Skip
from hdl.data.shards import write_durably
from hdl.survey.digest import (
    BLURRED,
    BUCKETS,
    FEW_IN_BUCKET,
    GROUPS,
    IN_BUCKET,
    IN_GROUP,
    SHORT_CAPTION,
    STRIP,
    Digest,
    Entry,
)
from hdl.survey.html import (
    NAMES,
    SHAPES,
    STYLE,
    bar_cells,
    between,
    counted,
    counts_between,
    folded,
    histogram,
    left_out,
    names,
    nearest_shape,
    outline,
    quotes,
    section,
    shortened,
    table,
    text,
)
from hdl.survey.survey import SIDE, Survey, survey, thumbnails

THUMB_SIDE = 192  # px; shown at half that, for screens of two dots a pixel
CAPTIONS = 8  # shown of each kind
ROWS = 100  # of a table
SIZES = (256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)  # px, bounds of the size chart's bars
BLURS = tuple(i / 4 for i in range(1, 17))  # px


def write_survey_page(
    out: Path,
    images: Path,
    entries: Iterable[Entry],
    *,
    skips: dict[str, Skip],
    notes: dict[str, str],
    area: int,
    workers: int = 0,
) -> None:
    """Look at every image of `entries` and write the page to the file `out`.

    images: the folder that sources are relative to. skips, notes: source -> why it is no sample, what else is
    said of it. area: side in px of the square whose area buckets have at most. workers: processes that
    decode. An image that has become unreadable since is listed on the page with the skips.
    """
    entries = list(entries)
    seen = survey(images, dict.fromkeys(entry.source for entry in entries), workers)
    digest = Digest.of(seen, entries, skips, notes, area)
    thumbs = thumbnails(images, digest.shown(), THUMB_SIDE, workers)
    write_durably(out, page(images.resolve().name, digest, thumbs).encode())


def page(title: str, digest: Digest, thumbs: dict[str, bytes]) -> str:
    """The whole page. title: what is surveyed, in words; thumbs: source -> WebP, of `digest.shown()`."""
    pictures = Pictures(digest.seen, thumbs)
    sections = [
        alike_section(digest, pictures),
        sharpness_section(digest, pictures),
        size_section(digest, pictures),
        bucket_section(digest, pictures),
        look_section(digest),
        caption_section(digest),
        skip_section(digest),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Curation report · {text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kind">Curation report</p>
<h1>{text(title)}</h1>
{key_numbers(digest)}
</header>
<main>
{what_to_look_at(digest)}
{"".join(sections)}
</main>
<footer>Written by tools/prepare.py of hdl. The page is complete in itself and loads nothing.</footer>
</body>
</html>
"""


# --- the top


def key_numbers(digest: Digest) -> str:
    facts = digest.seen.facts
    numbers = [(len(facts), "image" if len(facts) == 1 else "images")]
    if digest.samples != len(facts):
        numbers.append((digest.samples, "samples"))
    numbers.append((len(digest.buckets), "bucket" if len(digest.buckets) == 1 else "buckets"))
    numbers.append((len(digest.skips), "file skipped" if len(digest.skips) == 1 else "files skipped"))
    cells = [f"<div><dt>{label}</dt><dd>{number:,}</dd></div>" for number, label in numbers]
    if digest.captions:
        middle = median(digest.captions.values())
        cells.append(f"<div><dt>tokens in the median caption</dt><dd>{middle:,.0f}</dd></div>")
    return f'<dl class="numbers">{"".join(cells)}</dl>'


def what_to_look_at(digest: Digest) -> str:
    """The findings, each with why it matters and a link to its section."""
    items = [
        f'<li><a href="#{anchor}">{finding}</a> <span class="why">{why}</span></li>'
        for anchor, finding, why in findings(digest)
    ]
    body = f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing stands out.</p>"
    return f'<section class="findings"><h2>What to look at</h2>{body}</section>'


def findings(digest: Digest) -> list[tuple[str, str, str]]:
    """(section, what was found in words and numbers, why it matters), HTML, only what there is."""

    def images(count: int) -> str:
        return counted(count, "image")

    def verb(count: int, one: str, many: str) -> str:
        return one if count == 1 else many

    d = digest
    few = sum(len(d.buckets[grid]) for grid in d.sparse)
    alone = [name for name, count in (d.tags | d.styles).items() if count == 1]
    sharing = len({source for sources in d.shared.values() for source in sources})
    found = [
        (
            len(d.identical),
            "alike",
            f"{counted(len(d.identical), 'group')} of identical files ({images(sum(map(len, d.identical)))})",
            "an image counts as often as it is there",
        ),
        (
            len(d.near),
            "alike",
            f"{counted(len(d.near), 'group')} of near-duplicates ({images(sum(map(len, d.near)))})",
            "saved again, resized, lightly cropped or brightened; the largest comes first",
        ),
        (
            len(d.blurred),
            "sharpness",
            f"{images(len(d.blurred))} {verb(len(d.blurred), 'looks', 'look')} blurred",
            "an adapter learns softness as part of the look",
        ),
        (
            len(d.edgeless),
            "sharpness",
            f"{images(len(d.edgeless))} without a single edge",
            "blank, or blurred beyond measure",
        ),
        (
            len(d.small),
            "size",
            f"{images(len(d.small))} below the bucket area of {d.area} × {d.area} px",
            "trained at a smaller size, or enlarged if that is allowed",
        ),
        (
            len(d.sparse),
            "buckets",
            f"{counted(len(d.sparse), 'bucket')} with fewer than {FEW_IN_BUCKET} samples "
            f"({counted(few, 'sample')})",
            "shapes that are hardly trained at; crop to a common one, or leave out",
        ),
        (
            len(alone),
            "looks",
            f"{counted(len(alone), 'style or tag', 'styles or tags')} with only 1 image: "
            f"{text(', '.join(alone[:8]))}{', …' if len(alone) > 8 else ''}",
            "a slip of the pen, or too little to learn from",
        ),
        (
            len(d.short),
            "captions",
            f"{counted(len(d.short), 'caption')} shorter than {SHORT_CAPTION} tokens",
            "what a caption leaves out is learned as part of the concept",
        ),
        (
            sharing,
            "captions",
            f"{images(sharing)} {verb(sharing, 'shares its', 'share their')} caption with another image",
            "meant so for a bare trigger phrase, a slip elsewhere",
        ),
        (
            len(d.skips),
            "skipped",
            f"{counted(len(d.skips), 'file')} skipped",
            "each is listed with its reason",
        ),
    ]
    return [(anchor, finding, why) for count, anchor, finding, why in found if count]


# --- the sections


def alike_section(digest: Digest, pictures: "Pictures") -> str:
    if not digest.identical and not digest.near:
        return section("alike", "Duplicates", "<p>No two images are alike.</p>")
    parts = []
    for groups, kind in ((digest.identical, "identical files"), (digest.near, "near-duplicates")):
        for group in groups[:GROUPS]:
            more = f'<p class="more">and {len(group) - IN_GROUP:,} more</p>' if len(group) > IN_GROUP else ""
            shown = "".join(pictures.figure(source, pictures.size(source)) for source in group[:IN_GROUP])
            parts.append(
                f'<div class="group"><h3>{len(group):,} {kind}</h3><div class="strip">{shown}{more}</div></div>'
            )
        if len(groups) > GROUPS:
            parts.append(f'<p class="more">and {len(groups) - GROUPS:,} more groups of {kind}</p>')
    lines = [source for group in digest.identical + digest.near for source in (*group, "")]
    return section(
        "alike",
        "Duplicates",
        "<p>Mirror images and other views of one thing are not counted. The largest of each group is first.</p>"
        + "".join(parts)
        + names("All names, group by group", lines),
    )


def sharpness_section(digest: Digest, pictures: "Pictures") -> str:
    facts = digest.seen.facts
    blurs = [facts[source].blur or 0.0 for source in digest.softest]
    counts = counts_between(blurs, BLURS)
    chart = histogram(
        "Images by blur",
        counts,
        [f"{bound:g}" if bound == int(bound) else "" for bound in (0.0, *BLURS)] + [""],
        between(BLURS, "px"),
        flagged=lambda i: i > 0 and BLURS[i - 1] >= BLURRED,
        axis="blur, px",
    )
    flat = (
        f"<h3>Without an edge</h3>{pictures.strip(digest.edgeless, pictures.size)}" if digest.edgeless else ""
    )
    strip = pictures.strip(digest.softest[:STRIP], lambda source: f"blur {facts[source].blur or 0:.1f} px")
    return section(
        "sharpness",
        "Sharpness",
        f"<p>How far the sharpest tenth of a picture is blurred, seen at {SIDE} px: soft backgrounds do not "
        f"count. Above {BLURRED:g} px it looks blurred.</p>{chart}<h3>The softest</h3>{strip}{flat}"
        + names("All names that look blurred", digest.blurred + digest.edgeless),
    )


def size_section(digest: Digest, pictures: "Pictures") -> str:
    facts = digest.seen.facts.values()
    sides = [math.sqrt(fact.width * fact.height) for fact in facts]
    sizes = histogram(
        "Images by size",
        counts_between(sides, SIZES),
        ["", *map(str, SIZES), ""],
        between(SIZES, "px"),
        flagged=lambda i: i < len(SIZES) and SIZES[i] <= digest.area,
        axis="side of the square of the same area, px",
    )
    shapes = Counter(nearest_shape(fact.width / fact.height) for fact in facts)
    aspects = histogram(
        "Images by shape",
        [shapes[shape] for shape in SHAPES],
        list(SHAPES),
        list(SHAPES),
        axis="width : height",
    )
    formats = ", ".join(
        f"{count:,} × {text(name)}" for name, count in Counter(fact.format for fact in facts).most_common()
    )
    small = (
        f"<h3>Below {digest.area} × {digest.area} px, the smallest first</h3>"
        + pictures.strip(digest.small, pictures.size)
        + names("All names below the bucket area", digest.small)
        if digest.small
        else ""
    )
    return section(
        "size",
        "Size and shape",
        f'<div class="charts">{sizes}{aspects}</div><p class="quiet">Formats: {formats or "none"}</p>{small}',
    )


def bucket_section(digest: Digest, pictures: "Pictures") -> str:
    most = max(map(len, digest.buckets.values()), default=1)
    rows = [
        f"<tr><td>{outline(*grid)}</td><td class=n>{grid[1] * PATCH} × {grid[0] * PATCH}</td>"
        f"<td class=n>{grid[0] * grid[1]:,}</td>{bar_cells(len(sources), most, len(sources) < FEW_IN_BUCKET)}"
        f'<td class="minis">{"".join(map(pictures.mini, dict.fromkeys(sources[:IN_BUCKET])))}</td></tr>'
        for grid, sources in list(digest.buckets.items())[:ROWS]
    ]
    head = "<tr><th></th><th class=n>width × height</th><th class=n>patches</th><th class=n>samples</th><th></th><th></th></tr>"
    return section(
        "buckets",
        "Buckets",
        table(head, rows[:BUCKETS])
        + folded(f"{len(rows) - BUCKETS:,} smaller buckets", table(head, rows[BUCKETS:]), len(rows) > BUCKETS)
        + left_out(len(digest.buckets), ROWS, "buckets"),
    )


def look_section(digest: Digest) -> str:
    if not digest.styles and not digest.tags:
        return section("looks", "Styles and tags", "<p>No image has a style or a tag in styles.json.</p>")
    tables = []
    for counts, without, kind in (
        (digest.styles, digest.unstyled, "style"),
        (digest.tags, digest.untagged, "tag"),
    ):
        most = max([*counts.values(), without, 1])
        rows = [
            f"<tr><td>{text(name)}</td>{bar_cells(count, most, count == 1)}</tr>"
            for name, count in list(counts.items())[:ROWS]
        ]
        if without:
            rows.append(f"<tr><td class=quiet>no {kind}</td>{bar_cells(without, most, False)}</tr>")
        head = f"<tr><th>{kind}</th><th class=n>images</th><th></th></tr>"
        tables.append(f"<div>{table(head, rows)}{left_out(len(counts), ROWS, f'{kind}s')}</div>")
    return section("looks", "Styles and tags", f'<div class="charts">{"".join(tables)}</div>')


def caption_section(digest: Digest) -> str:
    if not digest.captions:
        return section("captions", "Captions", "<p>There are no captions.</p>")
    lengths = list(digest.captions.values())  # ascending
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if lengths[-1] // s < 24)
    bounds = tuple(range(step, lengths[-1] // step * step + 1, step))
    spaced = max(1, (len(bounds) + 1) // 8)
    chart = histogram(
        "Captions by length",
        counts_between(lengths, bounds)[: len(bounds) + 1],
        [f"{bound}" if i % spaced == 0 else "" for i, bound in enumerate((0, *bounds))] + [""],
        between(bounds, "tokens"),
        flagged=lambda i: i < len(bounds) and bounds[i] <= SHORT_CAPTION,
        axis="tokens of the caption, trigger and descriptors included",
    )
    numbers = f"<p>{lengths[0]:,} to {lengths[-1]:,} tokens, median {median(lengths):,.0f}.</p>"
    ordered = list(digest.captions.items())
    shortest = [
        (f"{tokens:,}", shortened(caption), source) for (source, caption), tokens in ordered[:CAPTIONS]
    ]
    longest = [
        (f"{tokens:,}", shortened(caption), source)
        for (source, caption), tokens in ordered[: CAPTIONS - 1 : -1][:3]
    ]
    shared = [
        (
            f"{len(sources):,}",
            shortened(caption),
            ", ".join(sources[:3]) + (", …" if len(sources) > 3 else ""),
        )
        for caption, sources in list(digest.shared.items())[:CAPTIONS]
    ]
    return section(
        "captions",
        "Captions",
        numbers
        + chart
        + quotes("The shortest", "tokens", shortest)
        + quotes("The longest", "tokens", longest)
        + quotes("Shared by several images", "images", shared)
        + left_out(len(digest.shared), CAPTIONS, "shared captions")
        + names(f"All names with fewer than {SHORT_CAPTION} tokens", [source for source, _ in digest.short]),
    )


def skip_section(digest: Digest) -> str:
    if not digest.skips and not digest.notes:
        return section("skipped", "Skipped files", "<p>None: every file is used.</p>")
    kinds = Counter(skip.kind for skip in digest.skips.values()).most_common()
    summary = ", ".join(f"{count:,} × {text(kind)}" for kind, count in kinds) or "none"
    head = "<tr><th>file</th><th>reason</th></tr>"
    rows = [
        f"<tr><td class=file>{text(source)}</td><td>{text(skip.reason)}</td></tr>"
        for source, skip in list(digest.skips.items())[:NAMES]
    ]
    remarks = [
        f"<tr><td class=file>{text(source)}</td><td>{text(note)}</td></tr>"
        for source, note in list(digest.notes.items())[:NAMES]
    ]
    return section(
        "skipped",
        "Skipped files",
        f"<p>{summary}.</p>"
        + (table(head, rows[:STRIP]) if rows else "")
        + folded(f"{len(rows) - STRIP:,} more", table(head, rows[STRIP:]), len(rows) > STRIP)
        + left_out(len(digest.skips), NAMES, "files")
        + folded(f"Notes on {counted(len(digest.notes), 'image')}", table("", remarks), bool(remarks)),
    )


# --- pictures


class Pictures:
    """Thumbnails and what is written under them."""

    def __init__(self, seen: Survey, thumbs: dict[str, bytes]) -> None:
        self.seen = seen
        self.thumbs = thumbs

    def size(self, source: str) -> str:
        fact = self.seen.facts[source]
        return f"{fact.width} × {fact.height} {text(fact.format)}"

    def figure(self, source: str, words: str) -> str:
        """A thumbnail over the file's name and `words` (HTML)."""
        name = text(source)
        return (
            f"<figure>{self.image(source)}<figcaption><span class=file title='{name}'>{name}</span>"
            f"<span class=quiet>{words}</span></figcaption></figure>"
        )

    def strip(self, sources: list[str], words: Callable[[str], str]) -> str:
        """The first STRIP of the sources, side by side."""
        figures = "".join(self.figure(source, words(source)) for source in sources[:STRIP])
        return f'<div class="strip">{figures}</div>' + left_out(len(sources), STRIP, "images")

    def mini(self, source: str) -> str:
        return self.image(source) if source in self.thumbs else ""

    def image(self, source: str) -> str:
        data = self.thumbs.get(source)
        if data is None:
            return "<div class=gone>no picture</div>"
        url = "data:image/webp;base64," + base64.b64encode(data).decode()
        return f"<img loading=lazy alt='{text(source)}' title='{text(source)}' src='{url}'>"
