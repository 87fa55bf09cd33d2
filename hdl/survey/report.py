"""The curation report of a prepared folder: what tools/prepare.py --report writes beside the shards."""

from pathlib import Path

from hdl.data.shards import Shards
from hdl.data.summary import Summary
from hdl.survey.digest import Entry
from hdl.survey.page import write_survey_page

FILE = "report.html"


def write_report_page(summary: Summary, areas: tuple[int, ...], workers: int) -> Path:
    """Look at every image that `prepare` took and write the page; where it is. areas: those asked for, in px a
    side; workers: processes that decode."""
    shards = Shards(summary.out)
    frame = len(shards.empty.input_ids) - 1  # the prompt's frame: the empty prompt is one space
    entries = [
        Entry(i.source, i.rows, i.cols, i.captions, [n - frame for n in i.text_tokens], i.style, i.tags)
        for i in shards.infos
    ]
    page = summary.out / FILE
    write_survey_page(
        page, summary.images, entries,
        skips=summary.skips, notes=summary.notes, area=max(areas), workers=workers,
    )  # fmt: skip
    return page
