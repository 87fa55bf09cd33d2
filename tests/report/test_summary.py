"""The page says what is in a run's folder, whatever that is, and needs nothing else."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from hdl.errors import HdlError
from hdl.report.chart import POINTS, decimated, line_chart, moving_mean, ticks
from hdl.report.summary import GRIDS, WIDEST, best_of, place, spread, write_summary
from tests.browser import needs_browser, see
from tests.survey.test_page import Page

WICKED = "</style><script>alert('1 & 2')</script><b>"
REPOSITORY = Path(__file__).parents[2]


def empty_run(folder: Path, trigger: str = "kotonia style") -> Path:
    folder.mkdir(parents=True)
    config = {
        "data": {"trigger": trigger},
        "save": {"output": str(folder)},
        "train": {"steps": 600, "lr": 0.000123},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    return folder


def write_curves(folder: Path, curves: dict[str, dict[int, float]], first_step: int = 0) -> None:
    """As a start of the run that begins after `first_step` steps."""
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
    for tag, curve in curves.items():
        for step, value in curve.items():
            writer.add_scalar(tag, value, step)
    writer.close()


def summary(folder: Path) -> tuple[str, Page]:
    html = write_summary(folder).read_text(encoding="utf-8")
    return html, Page(html)


def words(page: Page) -> str:
    return " ".join(page.words.split())


def row(html: str, tag: str) -> list[str]:
    """The cells of a metric, as they are read."""
    found = re.search(rf"<tr><td>{re.escape(tag)}</td>(.*?)</tr>", html)
    assert found, tag
    return [
        " ".join(re.sub("<.*?>", " ", cell).split()) for cell in re.findall("<td.*?>(.*?)</td>", found[1])
    ]


def chart(html: str, title: str) -> str:
    found = re.search(rf'<svg [^>]*aria-label="{re.escape(title)}">(.*?)</figure>', html, re.DOTALL)
    assert found, title
    return found[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with some of everything, and names that are markup."""
    folder = empty_run(tmp_path_factory.mktemp("runs") / "my <b>run", trigger=WICKED)
    bands = [f"{i / 4:.2f}-{(i + 1) / 4:.2f}" for i in range(4)]
    write_curves(
        folder,
        {
            "loss": {step: 1 / step + (step % 7) / 100 for step in range(1, 501)},
            "style/with": {0: 0.1, 250: 0.9, 500: 0.8},
            "style/without": {0: 0.1, 250: 0.3, 500: 0.2},
            "memorization/adapter": {0: 0.5, 500: 0.1},
            "held_out_ema/loss": {0: 0.5, 500: 0.3},
            "drift": {0: 0.0, 250: 0.03, 500: 0.02},
            "change": {0: 0.0, 500: 0.5},
            "held_out/loss": {0: 0.5, 250: math.nan, 500: 0.4},
            "save/stall_seconds": {250: 0.2, 500: 0.3},
            WICKED: {1: 1.0, 2: 2.0},
        }
        | {f"x0_error/sigma_{band}": {step: 1 / step for step in range(1, 501)} for band in bands}
        | {f"data/share/source {i}": {500: i / 55} for i in range(11)},
    )
    for name in ("adapter", "adapter_ema", "best", "pictures"):
        (folder / name).mkdir()
    (folder / "best/best.json").write_text(
        json.dumps({"step": 250, "score": 0.875, "gate": 0.9, "drift": 0.03})
    )
    for step, shade in ((0, 0), (250, 100), (500, 200)):
        Image.new("RGB", (2000, 1000), (shade, 0, 0)).save(folder / f"pictures/step-{step:06d}.png")
    skipped = {"step": 77, "why": f"the loss is {WICKED}", "samples": [{"key": "cat.png", "sigma": 0.25}]}
    (folder / "skipped.jsonl").write_text(
        json.dumps(skipped) + "\n" + '{"step": 78, "wh'
    )  # cut off by a kill
    return folder


def test_the_top_says_which_run_it_is_and_where_its_adapters_are(run: Path) -> None:
    _, page = summary(run)
    read = words(page)
    assert read.startswith("Run summary my <b>run steps 500 of 600 trigger </style>")
    assert re.search(r"date, UTC \d{4}-\d\d-\d\d \d\d:\d\d", read)
    for what, name in (("last", "adapter"), ("moving average", "adapter_ema"), ("best", "best")):
        assert f"{what} {run.resolve() / name}" in read
    assert "step 250, score 0.875, gate 0.9, drift 0.03" in read
    assert "lr = 0.000123" in read and re.search(r"hdl \d+\.\d+", read)


def test_metrics_have_their_first_best_and_last_value(run: Path) -> None:
    html, _ = summary(run)
    assert row(html, "style/with") == ["0.1 step 0", "↑ 0.9 step 250", "0.8 step 500"]
    assert row(html, "style/without") == ["0.1 step 0", "↓ 0.1 step 0", "0.2 step 500"]
    assert row(html, "memorization/adapter") == ["0.5 step 0", "–", "0.1 step 500"]
    assert row(html, "held_out_ema/loss") == ["0.5 step 0", "↓ 0.3 step 500", "0.3 step 500"]
    assert row(html, "drift") == ["0 step 0", "↓ 0 step 0", "0.02 step 500"]
    assert row(html, "held_out/loss") == ["0.5 step 0", "↓ 0.4 step 500", "0.4 step 500"]
    assert row(html, "change") == ["0 step 0", "–", "0.5 step 500"]
    assert "<tr><td>loss</td>" not in html


def test_what_was_never_finite_is_never_best() -> None:
    assert best_of("drift", {1: math.nan, 2: math.inf}) == (None, "")


def test_every_curve_is_drawn_and_bands_of_sigma_together(run: Path) -> None:
    html, page = summary(run)
    bands = chart(html, "x0_error by sigma")
    assert len(re.findall('<path class="c[0-3]"', bands)) == 4
    assert all(band in bands for band in ("0.00 – 0.25", "0.75 – 1.00"))
    loss = chart(html, "loss")
    assert loss.count("<path") == 2 and 'class="raw c0"' in loss  # each point, and the moving mean over them
    assert "step 1\nloss: 1.01" in loss and ">step<" in loss
    assert chart(html, "save/stall_seconds").count("<circle") == 2
    assert "held_out/loss 1 not finite, left out" in words(page)
    assert [len(re.findall("<li>", part)) for part in html.split('aria-label="data/share"')[1:]] == [8, 3]
    headings = re.findall("<h3>(.*?)</h3>", html)
    assert headings[0] == "training" and headings.count("training") == 1 and headings[-1] == "save"


def test_pictures_are_in_the_page_and_not_larger_than_it_needs(run: Path) -> None:
    html, page = summary(run)
    assert page.images() == ["after 0 steps", "after 250 steps", "after 500 steps"]
    reds = []
    for data in re.findall('src="data:image/jpeg;base64,(.*?)"', html):
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (WIDEST, WIDEST // 2)
        reds.append(image.getpixel((5, 5))[0])
    assert reds == pytest.approx([0, 100, 200], abs=3)


def test_skipped_steps_are_listed_but_for_a_line_cut_off(run: Path) -> None:
    html, page = summary(run)
    assert f"77 the loss is {WICKED} 1 sample cat.png at sigma 0.2500" in words(page)
    assert "<td class=n>78" not in html


def test_nothing_from_the_folder_becomes_markup(run: Path) -> None:
    html, page = summary(run)
    tags = [tag for tag, _ in page.tags]
    assert "b" not in tags and tags.count("script") == 1 and tags.count("style") == 1
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert page.words.count(WICKED) >= 4  # trigger, curve, reason, config
    assert all(link.startswith("data:") for link in page.links())
    assert "url(" not in html and "@import" not in html


def test_a_step_taken_again_counts_as_it_was_taken_last(tmp_path: Path) -> None:
    folder = empty_run(tmp_path / "run")
    write_curves(folder, {"drift": {2: 5.0, 4: 6.0, 6: 7.0}, "undone": {5: 1.0}})
    (folder / "pictures").mkdir()
    for step in (0, 4, 6):
        Image.new("RGB", (8, 8)).save(folder / f"pictures/step-{step:06d}.png")
    write_curves(folder, {"drift": {4: 1.0}}, first_step=3)
    html, page = summary(folder)
    assert "steps 4 of 600" in words(page)
    assert row(html, "drift") == ["5 step 2", "↓ 1 step 4", "1 step 4"]
    assert "undone" not in html
    assert page.images() == ["after 0 steps", "after 4 steps"]


def test_a_run_that_has_just_begun_has_a_page_that_says_so(tmp_path: Path) -> None:
    _, page = summary(empty_run(tmp_path / "run"))
    read = words(page)
    assert "steps 0 of 600 trigger kotonia style" in read
    for section, empty in (
        ("Adapter", "None yet"),
        ("Metrics", "None were measured."),
        ("Pictures", "None were drawn."),
        ("Curves", "There are none yet."),
        ("Skipped steps", "None: every step was taken."),
    ):
        assert f"{section} {empty}" in read, section


def test_many_pictures_are_shown_from_the_first_to_the_last(tmp_path: Path) -> None:
    folder = empty_run(tmp_path / "run")
    (folder / "pictures").mkdir()
    for step in range(0, 1000, 10):
        Image.new("RGB", (8, 8)).save(folder / f"pictures/step-{step:06d}.png")
    (folder / "pictures/step-000000.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    _, page = summary(folder)
    assert len(page.images()) == GRIDS - 1 and page.images()[-1] == "after 990 steps"
    assert "step-000000.png is not readable as a picture" in words(page)
    assert f"{GRIDS} of 100 are shown." in words(page)
    assert spread(list(range(47)), 24) == list(range(0, 47, 2))


@pytest.mark.parametrize(
    ("file", "holds", "complaint"),
    [
        ("skipped.jsonl", '{"step": 3}\n', r"skipped.jsonl, line 1: found .*expected step, why and samples"),
        ("best/best.json", "{", "best.json is not JSON"),
        ("best/best.json", "[1]", r"best.json holds '\[1\]', not an object"),
        ("config.toml", "= 3", "config.toml: not readable as TOML"),
        ("skipped.jsonl/", "", "cannot be read"),
        ("summary.html/", "", "summary.html could not be written"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, file: str, holds: str, complaint: str) -> None:
    folder = empty_run(tmp_path / "run")
    (folder / "best").mkdir()
    if file.endswith("/"):
        (folder / file).mkdir()
    else:
        (folder / file).write_text(holds)
    with pytest.raises(HdlError, match=complaint):
        write_summary(folder)


def test_the_tool_makes_the_pages_of_several_runs_and_says_what_is_none(tmp_path: Path) -> None:
    runs = [empty_run(tmp_path / name) for name in ("one", "two")]

    def tool(*folders: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/summary.py", *map(str, folders)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)

    done = tool(*runs, tmp_path)
    assert done.returncode == 1 and f"error: {tmp_path} holds no config.toml" in done.stderr
    assert done.stdout.split() == [str(run / "summary.html") for run in runs]
    assert all(run.name in Page((run / "summary.html").read_text()).words for run in runs)


def test_curves_have_their_place() -> None:
    assert place("x0_error/sigma_0.25-0.50") == ("x0_error", "x0_error by sigma", "0.25 – 0.50")
    assert place("held_out/loss") == ("held_out", "held_out/loss", "held_out/loss")
    assert place("drift")[0] == "metrics" and place("grad_norm")[0] == "training"
    assert place("new/thing") == ("new", "new/thing", "new/thing")


def test_long_curves_keep_their_spikes_and_ends() -> None:
    points = [(step, float(step % 10)) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    kept = decimated(points)
    assert len(kept) <= POINTS and kept == sorted(set(kept))
    assert {points[0], points[-1], (54_321, 99.0)} <= set(kept)
    assert decimated(points[:POINTS]) == points[:POINTS]


def test_a_moving_mean_does_not_lag() -> None:
    line = [(step, 3.0 * step) for step in range(300)]
    assert [value for _, value in moving_mean(line)[5:-5]] == pytest.approx([v for _, v in line[5:-5]])
    noisy = [(step, float(step % 2)) for step in range(3000)]
    assert all(abs(value - 0.5) < 0.02 for _, value in moving_mean(noisy))


@pytest.mark.parametrize(
    "values", [[0.0], [1e-30, 2e-30], [-5.0, -5.0], [41.30001, 41.30003], [1e38, -1e38], [math.nan]]
)
def test_any_values_make_a_chart(values: list[float]) -> None:
    html = line_chart("title", {"title": dict(enumerate(values))}, smooth=True)
    Page(html)
    labels = re.findall("class=y [^>]*>(.*?)<", html)
    assert len(set(labels)) == len(labels) >= (2 if math.isfinite(values[0]) else 0)
    assert "nan" not in html and "inf" not in html
    places = re.findall(r'cy="(.*?)"', html)
    assert len(places) == sum(map(math.isfinite, values)) and all(8 <= float(y) <= 158 for y in places)


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.13, 0.97, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(0, 2000, 6) == [0, 500, 1000, 1500, 2000]


@needs_browser
def test_a_browser_shows_it_all_and_fetches_nothing(run: Path, tmp_path: Path) -> None:
    html, _ = summary(run)
    page = tmp_path / "summary.html"
    page.write_text(html, encoding="utf-8")
    seen = see(page, tmp_path)
    assert (seen.images, seen.broken, seen.console, seen.fetched) == (3, [], [], [])
    assert seen.alts == ["after 500 steps"]  # the slider stands at the last
    assert seen.drawn > 10 and seen.text > 500 and seen.wide <= 1200
    assert see(page, tmp_path, "step-000250").alts == ["after 250 steps"]
    page.write_text(html + "<script>range.value = 0; range.dispatchEvent(new Event('input'))</script>")
    assert see(page, tmp_path).alts == ["after 0 steps"]


@needs_browser
def test_the_page_forbids_what_it_does_not_need(run: Path, tmp_path: Path) -> None:
    """Also: the looking-glass of these tests would see a request."""
    html, _ = summary(run)
    asks = "<img alt=spy src='https://example.org/spy.png'>"
    forbidden, page = tmp_path / "forbidden.html", tmp_path / "free.html"
    forbidden.write_text(html + asks, encoding="utf-8")
    page.write_text("<p>free</p>" + asks, encoding="utf-8")
    assert any("Content Security Policy" in line for line in see(forbidden, tmp_path).console)
    free = see(page, tmp_path)
    assert free.broken == ["spy"] and (free.fetched or free.console)
