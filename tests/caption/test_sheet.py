"""The contact sheet: all images and captions, in one file that needs nothing else."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from hdl.caption.sheet import Row, write_sheet
from tests.browser import needs_browser, see
from tests.caption.block_pictures import NAMES


def test_every_image_and_caption_is_in_it_and_text_is_escaped(images: Path, tmp_path: Path) -> None:
    rows = [
        Row(name, {f"{name}.txt": f"<script>alert('{name}')</script> & more"}, ["by hand"]) for name in NAMES
    ]
    write_sheet(tmp_path / "s.html", images, rows, ["a <b> summary"])
    page = (tmp_path / "s.html").read_text()
    assert "<script" not in page and "a &lt;b&gt; summary" in page
    for name in NAMES:
        assert f"&lt;script&gt;alert(&#x27;{name}&#x27;)&lt;/script&gt; &amp; more" in page
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures] == [(96, 64)] * len(NAMES)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "it must work offline"
    assert not list(tmp_path.glob(".*"))


def test_pages_and_an_unreadable_image(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdl.caption.sheet.PAGE", 3)
    (images / "c.png").write_bytes(b"no image")
    write_sheet(tmp_path / "s.html", images, [Row(name, {}, []) for name in NAMES], [])
    sections = re.findall(r'<section id="page\d">.*?</section>', (tmp_path / "s.html").read_text(), re.DOTALL)
    assert [section.count("<article>") for section in sections] == [3, 1]
    assert all('href="#page2"' in section for section in sections)
    assert "the content is damaged" in sections[0] and sections[0].count("no caption") == 3


@needs_browser
def test_a_browser_shows_every_image_of_every_page_and_has_nothing_to_say(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdl.caption.sheet.PAGE", 3)
    rows = [Row(name, {f"{name}.txt": "<script>alert(1)</script> said"}, ["by hand"]) for name in NAMES]
    write_sheet(tmp_path / "s.html", images, rows, ["a summary"])
    for fragment, shown in (("", 3), ("page1", 3), ("page2", 1)):
        seen = see(tmp_path / "s.html", tmp_path, fragment)
        assert (seen.images, seen.shown, seen.broken, seen.console) == (4, shown, [], []), fragment
        assert seen.text > 100 and seen.wide <= 1200


@needs_browser
def test_the_browser_would_tell_of_a_broken_page(tmp_path: Path) -> None:
    """So that the test above means something."""
    (tmp_path / "p.html").write_text(
        "<!doctype html><body>x<img alt=torn src=data:image/png;base64,AAAA><img alt=far src=http://a.example/b.png>"
        "<script>undefinedFunction()</script>"
    )
    seen = see(tmp_path / "p.html", tmp_path)
    assert seen.broken == ["torn", "far"] and any("undefinedFunction" in line for line in seen.console)
