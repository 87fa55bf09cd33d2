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
    empty = len(shards.empty.input_ids)
    entries = []
    for i in shards.infos:
        frame = (i.empty_tokens or empty) - 1  # of its prompts: the empty one is one space
        entries.append(
            Entry(i.source, i.rows, i.cols, i.captions, [n - frame for n in i.text_tokens], i.style, i.tags)
        )
    page = summary.out / FILE
    write_survey_page(
        page, summary.images, entries,
        skips=summary.skips, notes=summary.notes, area=max(areas), workers=workers,
    )  # fmt: skip
    return page
