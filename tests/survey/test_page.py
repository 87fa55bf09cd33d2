"""The page says what is there, in numbers that add up; it needs nothing else, and nothing in it runs."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageFilter

from hdl.data.images import Skip
from hdl.survey.digest import Digest, Entry
from hdl.survey.html import counts_between, nearest_shape
from hdl.survey.page import page, write_survey_page
from hdl.survey.survey import Facts, Survey
from tests.browser import needs_browser, see
from tests.data.image_folders import noise

SHELF = Path(skimage.__file__).parent / "data"
WICKED = "<script>alert('1 & 2')</script>"
NAME = "x<script>alert(1)<'\"&>.png"
VOID = {"meta", "img", "br", "line", "rect"}


class Page(HTMLParser):
    """A page that was parsed strictly: every tag closed in its order. Words as a reader sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[tuple[str, int]] = []  # of bars
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words += data + " "

    def links(self) -> list[str]:
        return [attrs[key] or "" for _, attrs in self.tags for key in ("src", "href") if key in attrs]

    def images(self) -> list[str]:
        return [attrs["alt"] or "" for tag, attrs in self.tags if tag == "img"]


def finding(words: str, parsed: Page) -> bool:
    """Whether the top of the page says so."""
    top = " ".join(parsed.words.split("What to look at")[1].split("Duplicates")[0].split())
    return words in top


def bars(html: str, title: str) -> list[int]:
    """The counts of a chart."""
    svg = re.search(rf'aria-label="{title}">(.*?)</svg>', html, re.DOTALL)
    assert svg
    return [int(count.replace(",", "")) for count in re.findall(r"<title>[^<]*: ([\d,]+)</title>", svg[1])]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a folder with some of everything."""
    images = tmp_path_factory.mktemp("my <b>set")
    coffee = Image.open(SHELF / "coffee.png")
    coffee.save(images / "coffee.png")
    coffee.save(images / "again.png")
    coffee.resize((300, 200)).save(images / "half.jpg")
    Image.open(SHELF / "chelsea.png").filter(ImageFilter.GaussianBlur(5)).save(images / "soft.png")
    Image.new("RGB", (64, 64), "white").save(images / "blank.png")
    noise(1200, 1000).save(images / NAME)
    entries = [
        Entry("coffee.png", 12, 18, ["a cup of coffee on a table", "coffee"], [16, 1], "plain", ["indoors"]),
        Entry("again.png", 12, 18, ["a cup of coffee on a table"], [16], "plain", ["indoors"]),
        Entry("half.jpg", 6, 9, ["a small cup"], [13], "plain"),
        Entry("soft.png", 9, 14, [WICKED], [20], "plain", ["in doors", WICKED]),
        Entry("blank.png", 2, 2, ["nothing"], [2]),
        Entry(NAME, 28, 34, ["grain"], [12], "plain"),
        Entry(NAME, 14, 17, ["grain"], [12], "plain"),
        Entry("gone.png", 9, 14, ["was here before"], [11], "plain", ["indoors"]),
    ]
    write_survey_page(
        images / "report.html",
        images,
        entries,
        skips={
            "torn.png": Skip("corrupt image", "the image is corrupt & cut off"),
            "b\udcff.png": Skip("x", "y"),
        },
        notes={"half.jpg": "the file has 2 frames; the first one is used"},
        area=1024,
    )
    return (images / "report.html").read_text(encoding="utf-8")


def test_it_parses_and_needs_nothing_else(html: str) -> None:
    parsed = Page(html)
    assert parsed.tags[0][0] == "html" and html.startswith("<!DOCTYPE html>")
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in parsed.links())
    anchors = {attrs["id"] for _, attrs in parsed.tags if "id" in attrs}
    assert {link[1:] for link in parsed.links() if link.startswith("#")} <= anchors
    assert "url(" not in html and "@import" not in html


def test_nothing_from_files_becomes_markup(html: str) -> None:
    parsed = Page(html)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "b")]
    assert not [key for _, attrs in parsed.tags for key in attrs if key.startswith("on")]
    assert WICKED in parsed.words and NAME in parsed.words and NAME in parsed.images()
    assert "my <b>set" in parsed.words


def test_the_top_says_what_to_look_at_in_numbers(html: str) -> None:
    parsed = Page(html)
    for words in (
        "1 group of near-duplicates (3 images)",
        "1 image looks blurred",
        "1 image without a single edge",
        "5 images below the bucket area of 1024 × 1024 px",
        "6 buckets with fewer than 4 samples (8 samples)",
        f"2 styles or tags with only 1 image: in doors, {WICKED}",
        "2 captions shorter than 10 tokens",
        "2 images share their caption with another image",
        "3 files skipped",
    ):
        assert finding(words, parsed), words
    assert not finding("identical", parsed)


def test_the_charts_count_every_image_and_caption_once(html: str) -> None:
    assert sum(bars(html, "Images by size")) == sum(bars(html, "Images by shape")) == 6
    assert sum(bars(html, "Images by blur")) == 5  # all but the blank one
    assert sum(bars(html, "Captions by length")) == 8
    assert bars(html, "Images by size")[0] == 2  # 64x64 and 300x200


def test_every_skip_has_its_reason_also_of_images_gone_since(html: str) -> None:
    words = Page(html).words
    assert "torn.png the image is corrupt & cut off" in words
    assert "gone.png the file cannot be read (No such file or directory)" in words
    assert "b?.png y" in words
    assert "half.jpg the file has 2 frames" in words


def test_pictures_are_of_the_images_named(html: str) -> None:
    shown = Counter(Page(html).images())
    assert {"coffee.png", "again.png", "half.jpg", "soft.png", "blank.png", NAME} == set(shown)


def facts(i: int, **changed: object) -> Facts:
    values = {
        "width": 1024,
        "height": 1024,
        "format": "PNG",
        "sha256": str(i),
        "hash": i,
        "blur": 0.5,
        "mini": b"",
    }
    return Facts(**(values | changed))  # type: ignore[arg-type]


def digest_of(images: dict[str, Facts], entries: list[Entry], **more: object) -> Digest:
    seen = Survey(facts=images, **more)  # type: ignore[arg-type]
    return Digest.of(seen, entries, {}, {}, area=1024)


def test_a_clean_set_is_called_clean() -> None:
    images = {f"{i}.png": facts(i) for i in range(8)}
    html = page(
        "set", digest_of(images, [Entry(s, 32, 32, [f"a long caption of {s}"], [30]) for s in images]), {}
    )
    assert "Nothing stands out." in Page(html).words


def test_identical_files_are_named_so_and_the_largest_of_a_group_is_first() -> None:
    images = {"a.png": facts(1), "b.png": facts(1), "c.png": facts(2), "d.png": facts(3, width=2048)}
    entries = [Entry(source, 32, 32, [f"a long caption of {source}"], [30]) for source in images]
    html = page("set", digest_of(images, entries, alike=[["a.png", "b.png"], ["c.png", "d.png"]]), {})
    parsed = Page(html)
    assert finding("1 group of identical files (2 images)", parsed)
    assert finding("1 group of near-duplicates (2 images)", parsed)
    assert parsed.words.index("d.png") < parsed.words.index("c.png")


def test_views_of_an_image_are_samples_but_one_image() -> None:
    images = {"a.png": facts(1)}
    entries = [Entry("a.png", n, n, ["kotonia style, a thing"], [12], "kotonia", ["night"]) for n in (32, 16)]
    digest = digest_of(images, entries)
    assert digest.styles == {"kotonia": 1} and digest.tags == {"night": 1}
    assert len(digest.captions) == 1 and not digest.shared
    assert digest.buckets == {(16, 16): ["a.png"], (32, 32): ["a.png"]}


def test_no_image_left_still_makes_a_page(tmp_path: Path) -> None:
    entries = [Entry("a.png", 2, 2, [], [])]
    write_survey_page(tmp_path / "report.html", tmp_path, entries, skips={}, notes={}, area=64)
    assert finding("1 file skipped", Page((tmp_path / "report.html").read_text()))


def crowd(count: int) -> tuple[Digest, dict[str, bytes]]:
    """A large set in which everything is wrong, with thumbnails of 6 kB."""
    rng = np.random.default_rng(0)
    images = {
        f"a folder/and one below/picture {i:06}.jpg": facts(
            i,
            width=int(rng.integers(64, 4096)),
            height=int(rng.integers(64, 4096)),
            blur=float(rng.random() * 6),
        )
        for i in range(count)
    }
    names = list(images)
    entries = [
        Entry(
            name,
            1 + i % 60,
            1 + i % 70,
            ["word " * (i % 400)],
            [i % 400],
            f"style {i % 300}",
            [f"tag {i % 900}"],
        )
        for i, name in enumerate(names)
    ]
    groups = [names[i : i + 10] for i in range(0, count // 2, 10)]
    skips = {f"{i}.png": Skip("corrupt image", "the image is corrupt or cut off " * 3) for i in range(count)}
    digest = Digest.of(Survey(images, {}, groups), entries, skips, {}, area=1024)
    return digest, {source: rng.bytes(6000) for source in digest.shown()}


def test_the_page_stays_small() -> None:
    digest, thumbs = crowd(2000)
    html = page("crowd", digest, thumbs)
    assert len(thumbs) < 300
    assert len(html) < 5_000_000
    assert "and 1,000 more files" in Page(html).words
    assert sum(bars(html, "Images by size")) == sum(bars(html, "Images by blur")) == 2000
    assert len(page("crowd", *crowd(10_000))) < 1.2 * len(html)


def test_what_lies_on_a_bound_is_counted_above_it() -> None:
    assert counts_between([0, 1, 1.5, 2, 99], [1, 2]) == [1, 2, 2]
    assert counts_between([], [1, 2]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [
        (1000, 1000, "1:1"),
        (1920, 1080, "16:9"),
        (1080, 1920, "9:16"),
        (6000, 4000, "3:2"),
        (300, 100, ">2:1"),
    ],
)
def test_shapes_have_common_names(width: int, height: int, shape: str) -> None:
    assert nearest_shape(width / height) == shape


@needs_browser
def test_a_browser_shows_every_image_and_has_nothing_to_say(html: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    seen = see(tmp_path / "report.html", tmp_path)
    assert seen.images == len(Page(html).images()) > 5
    assert (seen.broken, seen.console) == ([], [])
    assert seen.shown == seen.images and seen.text > 1000 and seen.wide <= 1200
