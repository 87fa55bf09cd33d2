"""The contact sheet: one HTML file of every image and its captions, to be looked through before training.

Thumbnails are inside it, pages are parts of it that its links show one at a time: it needs no network, no script and
no other file, and may be sent to someone.
"""

import base64
import html
import io
import os
from dataclasses import dataclass
from pathlib import Path

from hdl.caption.question import picture
from hdl.data.images import Skip

PAGE = 200  # images
THUMBNAIL = 320  # px
HEAD = """<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 1em }}
article {{ display: flex; gap: 1.2em; border-top: 1px solid #ccc; padding: 1em 0 }}
article > div:first-child {{ flex: 0 0 {px}px }} img {{ max-width: 100% }}
h2 {{ font-size: 1em; margin: 0; overflow-wrap: anywhere }} p {{ margin: .5em 0; white-space: pre-wrap }}
.file {{ color: #777 }} .flag {{ background: #fd8; padding: 0 .3em }}
section {{ display: none }} section:target {{ display: block }}
body:not(:has(section:target)) section:first-of-type {{ display: block }}
nav a {{ margin-right: .6em }}</style></head><body><h1>{title}</h1>
"""


@dataclass(frozen=True)
class Row:
    """One image: its captions by file name, and what is to be said of it ("by hand", "refused", ...)."""

    source: str
    captions: dict[str, str]
    flags: list[str]


def write_sheet(path: Path, images: Path, rows: list[Row], summary: list[str]) -> None:
    """Write it complete or not at all. OSError where it cannot be written."""
    pages = range(1, -(-len(rows) // PAGE) + 1)
    links = " ".join(f'<a href="#page{page}">{page}</a>' for page in pages)
    nav = f"<nav>page {links}</nav>\n" if len(pages) > 1 else ""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write(HEAD.format(title=f"captions of {html.escape(images.name)}", px=THUMBNAIL))
        file.write(f"<pre>{html.escape(chr(10).join(summary))}</pre>\n")
        for number, row in enumerate(rows):
            if number % PAGE == 0:
                file.write(
                    ("</section>\n" if number else "") + f'<section id="page{number // PAGE + 1}">\n{nav}'
                )
            file.write(article(images, row))
        file.write(f"{nav}</section></body></html>\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def article(images: Path, row: Row) -> str:
    flags = "".join(f' <span class="flag">{html.escape(flag)}</span>' for flag in row.flags)
    texts = "".join(
        f'<p><span class="file">{html.escape(name)}</span><br>{html.escape(caption)}</p>'
        for name, caption in row.captions.items()
    )
    return (
        f"<article><div>{thumbnail(images / row.source)}</div><div><h2>{html.escape(row.source)}{flags}</h2>"
        f"{texts or '<p>no caption</p>'}</div></article>\n"
    )


def thumbnail(path: Path) -> str:
    """An <img> that holds the picture, or why there is none."""
    try:
        small = picture(path, THUMBNAIL)
    except Skip as skip:
        return html.escape(skip.reason)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
