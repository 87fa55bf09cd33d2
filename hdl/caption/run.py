"""Caption a folder: which captions are wanted, ask for them, write each as it comes, and show them all.

A killed run loses nothing: started again, it finds its answers on record and asks only for the rest. Under torchrun
each rank takes every n-th image, with a model of its own; they meet once, at the end, for the summary.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from hdl.caption.models import LocalModel, device_for
from hdl.caption.question import Answer, Backend, Question
from hdl.caption.records import BY_HAND, MISSING, Records
from hdl.caption.rules import EMPTY, REFUSED, TOO_LONG, caption_of
from hdl.caption.server import Server
from hdl.caption.settings import Settings, placeholders
from hdl.caption.sheet import Row, write_sheet
from hdl.caption.summary import KEPT, REWORDED, WRITTEN, Outcome, Summary, describe, summarize
from hdl.data.captions import STYLES_FILE, Look, check_options, read_caption, read_styles
from hdl.data.files import Folder, list_folder
from hdl.data.images import Skip, read_bytes
from hdl.errors import HdlError
from hdl.seeds import derive_seed


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local_rank: int

    def gather(self, mine: list[Outcome]) -> list[Outcome]:
        """Everyone's, on rank 0, once all are done; elsewhere nothing."""
        if self.world == 1:
            return mine
        lists: list[list[Outcome]] | None = [[] for _ in range(self.world)] if self.rank == 0 else None
        dist.gather_object(mine, lists)
        return [outcome for outcomes in lists or [] for outcome in outcomes]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """As torchrun says in the environment; without it, a world of one."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield Ranks(0, 1, 0)
        return
    # Ranks do not wait for each other until the end, and the last may come hours after the first.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
        time.sleep(0.25)  # see hdl/engine/processes.py


def caption(
    images: Path, settings: Settings, sheet: Path | None = None, overwrite: bool = False
) -> Summary | None:
    """Give every image of a folder its captions. The summary, on rank 0.

    sheet: the contact sheet's path; None: beside the folder. overwrite: captions by hand are replaced, too.
    HdlError for anything wrong with the folder, its styles.json, the settings or the model, before any caption is
    written. An image that cannot be read or gets no caption is counted and named, never an error.
    """
    images = images.resolve()
    sheet = sheet_path(images, sheet)
    try:
        sources = list_folder(images, leave_out=sheet).images
        styles = read_styles(images, sources)
        check(settings, styles, sources)
        records = Records(images)
    except HdlError as error:
        raise HdlError(str(error), on_all_ranks=True) from None
    with ranks() as here, writing(images):
        job = Job(images, settings, styles, records, overwrite)
        questions = job.plan(sources[here.rank :: here.world])
        if questions:
            job.ask(open_backend(settings, here), questions, quiet=here.rank > 0)
        outcomes = here.gather(job.outcomes)
        if here.rank:
            return None
        rows = rows_of(list_folder(images, leave_out=sheet), outcomes)
        texts = [text for row in rows for text in row.captions.values()]
        summary = summarize(len(rows), outcomes, texts, sheet, settings)
        write_sheet(sheet, images, rows, describe(summary))
    return summary


def sheet_path(images: Path, sheet: Path | None) -> Path:
    sheet = sheet or images.parent / f"{images.name}.captions.html"
    if sheet.suffix.lower() != ".html" or not os.access(sheet.resolve().parent, os.W_OK):
        raise HdlError(
            f"--sheet: found {sheet}, expected a path ending in .html in a folder that you may write to",
            on_all_ranks=True,
        )
    return sheet


def check(settings: Settings, styles: dict[str, Look], sources: list[str]) -> None:
    """HdlError where an option reaches no image, or two images would have the same caption file."""
    check_options(settings.around(), styles)
    if not styles and (used := placeholders(settings.prompt)):
        raise HdlError(
            f"prompt: found {{{'}, {'.join(sorted(used))}}}, but no image has a style or tags; describe them in "
            f"{STYLES_FILE}, or leave the braces out"
        )
    owner: dict[str, str] = {}
    for source in sources:
        for number in range(settings.captions_per_image):
            other = owner.setdefault(caption_file(source, number), source)
            if other != source:
                raise HdlError(
                    f"{other} and {source} would share the caption {caption_file(source, number)}; rename one of them"
                )


def caption_file(source: str, number: int) -> str:
    """a/b.png -> a/b.txt, a/b.1.txt, a/b.2.txt, ..."""
    return os.path.splitext(source)[0] + (f".{number}.txt" if number else ".txt")


def open_backend(settings: Settings, here: Ranks) -> Backend:
    if settings.server:
        return Server(settings)
    return LocalModel(settings, device_for(here.local_rank))


@dataclass
class Job:
    """One rank's share of a folder."""

    images: Path
    settings: Settings
    styles: dict[str, Look]
    records: Records
    overwrite: bool

    def __post_init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def plan(self, sources: list[str]) -> list[Question]:
        """The captions that the model has to be asked for. What needs no model is done at once."""
        questions = []
        for source in sources:
            try:
                image_sha256 = hashlib.sha256(read_bytes(str(self.images / source))).hexdigest()
            except Skip as skip:
                self.outcomes.append(Outcome(source, source, "unreadable", skip.reason))
                continue
            for number in range(self.settings.captions_per_image):
                question = self.question(source, number, image_sha256)
                if not self.settled(question):
                    questions.append(question)
        return questions

    def question(self, source: str, number: int, image_sha256: str) -> Question:
        """recipe: of all that an answer depends on, so that a changed rule asks the model nothing."""
        s, look = self.settings, self.styles.get(source, Look())
        prompt = s.prompt_for(look)
        drawn = [s.temperature, s.seed, number] if s.temperature else []
        recipe = [image_sha256, s.model, s.bits, s.max_side, prompt, s.max_new_tokens, *drawn]
        return Question(
            self.images / source,
            source,
            caption_file(source, number),
            look,
            prompt,
            derive_seed(s.seed, "caption", image_sha256, number),
            image_sha256,
            hashlib.sha256(json.dumps(recipe).encode()).hexdigest(),
        )

    def settled(self, question: Question) -> bool:
        """Whether the caption is a person's, or made of an answer on record: then it is put right at once."""
        state, text = self.records.state(self.images / question.file, question.file)
        if state == BY_HAND and not self.overwrite:
            self.done(question, BY_HAND)
            return True
        answer = self.records.answers.get((question.file, question.recipe))
        if answer is None:
            return False
        try:
            wanted = caption_of(answer, question.look, self.settings)
        except Skip:  # by a changed rule; the model is asked once more
            return False
        if text == wanted:
            self.done(question, KEPT, cut=answer.cut)
        else:
            self.write(question, answer, wanted, WRITTEN if state == MISSING else REWORDED)
        return True

    def ask(self, backend: Backend, questions: list[Question], quiet: bool) -> None:
        """Write every caption as it comes. An answer that is none is asked for once more where it may differ."""
        with tqdm(total=len(questions), desc="captioning", unit="caption", disable=quiet or None) as bar:
            for drawn_again in (self.settings.temperature > 0, False):
                again = []
                for question, answer in backend.ask(questions):
                    try:
                        if isinstance(answer, Skip):
                            raise answer
                        text = caption_of(answer, question.look, self.settings)
                    except Skip as skip:
                        if drawn_again and skip.kind in (EMPTY, REFUSED, TOO_LONG):
                            again.append(replace(question, seed=derive_seed(question.seed, "again")))
                            continue
                        self.failed(question, skip)
                    else:
                        self.write(question, answer, text, WRITTEN)
                    bar.update()
                if not (questions := again):
                    break

    def write(self, question: Question, answer: Answer, caption: str, kind: str) -> None:
        self.records.write(question, self.images / question.file, answer, caption, self.settings.model)
        self.done(question, kind, cut=answer.cut)

    def done(self, question: Question, kind: str, cut: bool = False) -> None:
        self.outcomes.append(Outcome(question.source, question.file, kind, cut=cut))

    def failed(self, question: Question, skip: Skip) -> None:
        if skip.kind not in (
            EMPTY,
            REFUSED,
            TOO_LONG,
            "server error",
        ):  # the image itself, the same for all its captions
            outcome = Outcome(question.source, question.source, "unreadable", skip.reason)
            if outcome not in self.outcomes:
                self.outcomes.append(outcome)
            return
        state, _ = self.records.state(self.images / question.file, question.file)
        stays = "" if state == MISSING else "; the earlier caption stays"
        self.outcomes.append(Outcome(question.source, question.file, skip.kind, skip.reason + stays))


@contextmanager
def writing(images: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HdlError(
            f"{error.filename or images}: writing stopped ({error.strerror or error}); make room or repair access and "
            "run again: finished captions are kept"
        ) from error


def rows_of(folder: Folder, outcomes: list[Outcome]) -> list[Row]:
    """Every image with all captions that it has on disk, whoever wrote them, and what went otherwise than well."""
    flags: dict[str, list[str]] = {}
    for o in outcomes:
        if o.kind not in (WRITTEN, REWORDED, KEPT):
            flags.setdefault(o.source, []).append(f"{o.kind}: {o.reason}" if o.reason else o.kind)
    rows = []
    for source in folder.images:
        captions = {}
        for file in folder.captions_of(source):
            with suppress(Skip):
                captions[file] = read_caption(folder.root / file)
        rows.append(Row(source, captions, flags.get(source, [])))
    return rows
