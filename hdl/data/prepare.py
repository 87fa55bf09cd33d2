"""From a folder of images and captions to a folder of shards.

For each image in order: find its captions, ask whether an earlier run already made these very samples of it,
and if not decode, resize and patchify it. Images stream through; memory holds their names and little else. What
an earlier run made from the same bytes, captions, options and base is taken over without decoding, also when
that run was killed before it finished.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from hdl.data.captions import (
    USUAL_TEXT_TAG,
    CaptionOptions,
    Look,
    captions_of,
    check_options,
    may_mirror,
    no_caption,
    read_styles,
)
from hdl.data.earlier import Earlier, Known, read_earlier
from hdl.data.files import Folder, list_folder
from hdl.data.images import Skip
from hdl.data.index import VERSION
from hdl.data.output import check_same_images, claimed
from hdl.data.pictures import Job, Picture, Pictures, answer_weight, job_weight, pictures_or_skip
from hdl.data.samples import SampleInfo, Tokens, hash_of_captions, payload_of
from hdl.data.shard_writer import SHARD_BYTES, ShardWriter
from hdl.data.shards import check_base
from hdl.data.summary import Summary, nothing_usable, write_report
from hdl.data.summary import describe as describe
from hdl.data.texts import Texts
from hdl.data.views import Sizes
from hdl.data.workers import in_order
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.patches import PATCH
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.o1.visual import Eyes

NO_LOOK = Look()
NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]+")
# To be raised when the same inputs give other samples than before: earlier ones are then made anew.
RECIPE = 3
AT_ONCE = 64  # images whose captions are tokenized together


@dataclass(frozen=True)
class Options:
    """area: side(s) in px of the square(s) whose area no bucket exceeds; each gives every image a sample. crops:
    further samples of each image, windows of it. allow_upscaling: enlarge small images. keep_direction: images
    with one of these tags are never to be mirrored. captions.orders: see there."""

    area: int | tuple[int, ...] = 1024
    allow_upscaling: bool = False
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    crops: int = 0
    keep_direction: tuple[str, ...] = (USUAL_TEXT_TAG,)

    @property
    def sizes(self) -> Sizes:
        areas = self.area if isinstance(self.area, tuple) else (self.area,)
        return Sizes(tuple(sorted(set(areas))), self.crops, self.allow_upscaling)


@dataclass(frozen=True)
class Wording:
    """An image's captions as they are kept, their token ids, and a note for the report or None."""

    captions: list[str]
    ids: list[list[int]]
    note: str | None


@dataclass
class Task:
    """One image with a good caption, on its way to become samples.

    candidates: its captions before they are tokenized. wording: they tokenized; None where an earlier run did
    that, unless the image turns out to have changed.
    """

    source: str
    look: Look
    candidates: list[str]
    notes: list[str]
    mirrored: bool
    recipe: str  # but for the view
    earlier: dict[str | None, Known]
    job: Job
    wording: Wording | None


def prepare(
    images: str | Path,
    out: str | Path,
    base: str | Path,
    *,
    config_from: str | Path | None = None,
    random_init: bool = False,
    options: Options = Options(),
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Summary:
    """Make `out` hold exactly the usable images of `images`, as shards for the checkpoint `base`.

    workers: processes that decode; 0 decodes in this one. config_from, random_init: as for open_checkpoint.
    HdlError for anything wrong with the folders, styles.json, the options or the checkpoint, before any work,
    where another run writes to `out`, and where no image is usable. A single bad file is skipped and reported,
    never an error.
    """
    images, out = Path(images), Path(out)
    check_numbers(options, workers)
    folder = list_folder(images, leave_out=out)
    styles = read_styles(images, folder.images)
    check_options(options.captions, styles, options.keep_direction)
    with claimed(out) as index:
        checkpoint = open_checkpoint(base, config_from, random_init)
        texts = Texts(PromptEncoder(checkpoint))
        eyes = Eyes(checkpoint.folder) if folder.references else None
        fingerprint = checkpoint.fingerprint()
        if index:
            check_base(out, index, fingerprint)
        earlier = read_earlier(out, index)
        check_same_images(out, earlier, folder)

        summary = Summary(images, out, skips=dict(folder.skips))
        writer = ShardWriter(out, earlier, shard_bytes)
        with writing(writer):
            tasks = Plan(folder, styles, options, texts, eyes, fingerprint, earlier, summary).tasks()
            jobs = ((task, task.job) for task in tasks)
            for task, answer in in_order(pictures_or_skip, jobs, workers, job_weight, answer_weight):
                try:
                    infos = store(task, answer, texts, eyes, writer, summary)
                except Skip as skip:
                    summary.skips[task.source] = skip
                else:
                    summary.count(infos)
            if not summary.taken:
                raise nothing_usable(summary)
            empty = texts.tokens([texts.encoder.ids(UNCONDITIONAL_PROMPT)])
            writer.finish(
                base={"fingerprint": fingerprint, "hidden_size": checkpoint.config.hidden_size},
                options=asdict(options),
                empty=payload_of(empty),
                empty_tokens=len(empty.input_ids),
            )
            summary.removed = writer.removed()
            summary.shards = len(writer.shards)
            summary.buckets = writer.buckets()
            write_report(summary)
    return summary


def check_numbers(options: Options, workers: int) -> None:
    areas = options.sizes.areas
    if not areas or areas[0] < PATCH:
        found = areas[0] if areas else "none"
        raise HdlError(f"--area: found {found}, expected at least {PATCH} (pixels, one patch)")
    for option, number, meaning in (
        ("--crops", options.crops, "windows an image"),
        ("--shuffle-sentences", options.captions.orders, "further captions a caption"),
    ):
        if number < 0:
            raise HdlError(f"{option}: found {number}, expected 0 or more ({meaning})")
    if workers < 0:
        raise HdlError(f"--workers: found {workers}, expected 0 (decode in this process) or more")


@dataclass
class Plan:
    """The images with good captions, one by one; the others go to the summary's skips."""

    folder: Folder
    styles: dict[str, Look]
    options: Options
    texts: Texts
    eyes: Eyes | None  # where there are pairs
    fingerprint: str
    earlier: Earlier
    summary: Summary

    def tasks(self) -> Iterator[Task]:
        images = self.folder.images
        progress = tqdm(total=len(images), desc="preparing", unit="image", disable=None)
        for start in range(0, len(images), AT_ONCE):
            sources = images[start : start + AT_ONCE]
            found = [task for source in sources if (task := self._task(source))]
            unknown = [task for task in found if not task.earlier]
            wordings = dict(zip((task.source for task in unknown), tokenize(unknown, self.texts)))
            for task in found:
                wording = wordings.get(task.source)
                if isinstance(wording, Skip):
                    self.summary.skips[task.source] = wording
                else:
                    task.wording = wording
                    yield task
            progress.update(len(sources))
        progress.close()

    @cached_property
    def _made_from(self) -> list[object]:
        """What all images' samples are made from. The scale an image is decoded at follows from all its views."""
        return [VERSION, RECIPE, self.fingerprint, self.texts.identity(), asdict(self._sizes)]

    @cached_property
    def _sizes(self) -> Sizes:
        return self.options.sizes

    @cached_property
    def _root(self) -> str:
        return os.path.join(self.folder.root, "")

    def _task(self, source: str) -> Task | None:
        folder, sizes, root = self.folder, self._sizes, self._root
        look = self.styles.get(source, NO_LOOK)
        try:
            paths = [root + path for path in folder.captions_of(source)]
            if not paths:
                raise no_caption(f"{Path(source).stem}.txt")
            references = folder.references_of(source)
            candidates, notes = captions_of(paths, look, self.options.captions)
        except Skip as skip:
            self.summary.skips[source] = skip
            return None
        if references:  # a window of the target is no longer what becomes of them
            sizes = replace(sizes, crops=0)
        mirrored = may_mirror(candidates, look.tags, self.options.keep_direction)
        made_from: list[object] = [candidates, notes, look.style, look.tags, mirrored, len(references)]
        if references and self.eyes:
            made_from.append(self.eyes.identity())
        recipe = hashlib.sha256(json.dumps(self._made_from + made_from).encode()).hexdigest()
        earlier = {
            view: known
            for view in (sizes.names() if self.earlier.shards else ())
            if (known := self.earlier.find(source, recipe_of(recipe, view)))
        }
        job = Job(
            root + source,
            sizes,
            tuple(root + path for path in references),
            {view: known.info.image_sha256 for view, known in earlier.items()},
        )
        return Task(source, look, candidates, notes, mirrored, recipe, earlier, job, None)


def recipe_of(recipe: str, view: str | None) -> str:
    return hashlib.sha256(f"{recipe} {view}".encode()).hexdigest()


def tokenize(tasks: list[Task], texts: Texts) -> Iterator[Wording | Skip]:
    """The captions of each task as they are kept; the Skip of the first where none can be used."""
    answers = iter(texts.ids([caption for task in tasks for caption in task.candidates]))
    for task in tasks:
        captions, all_ids, notes = [], [], list(task.notes)
        first: Skip | None = None
        for caption in task.candidates:
            ids = next(answers)
            if isinstance(ids, Skip):
                first = first or ids
                notes.append(ids.reason)
            else:
                captions.append(caption)
                all_ids.append(ids)
        if first and not captions:
            yield first
        else:
            yield Wording(captions, all_ids, "; ".join(notes) or None)


def store(
    task: Task,
    answer: Pictures | Skip,
    texts: Texts,
    eyes: Eyes | None,
    writer: ShardWriter,
    summary: Summary,
) -> list[SampleInfo]:
    """Give all samples of an image to the writer; what is known of each. Raises Skip."""
    if isinstance(answer, Skip):
        raise answer
    made = any(isinstance(view, Picture) for view in answer.views)
    wording = task.wording or (next(tokenize([task], texts)) if made else None)
    if isinstance(wording, Skip):
        raise wording
    tokens = texts.tokens(wording.ids) if made and wording else None
    infos = []
    for view in answer.views:
        if isinstance(view, Picture):
            assert wording and tokens
            if view.references and eyes:
                info, payload = make_pair(task, answer, view, wording, texts, eyes)
            else:
                info, payload = make_sample(task, answer, view, wording, tokens)
            writer.add(info, payload)
            summary.new += 1
        else:
            info = task.earlier[view].info
            writer.reuse(task.earlier[view])
            summary.reused += 1
        infos.append(info)
    return infos


def make_sample(
    task: Task, pictures: Pictures, picture: Picture, wording: Wording, tokens: Tokens
) -> tuple[SampleInfo, bytes]:
    """A sample's line (shard and offset still open) and its safetensors bytes."""
    payload = payload_of(tokens, picture.patches, [patches for _, patches in picture.references])
    info = SampleInfo(
        key=key_of(task.source, picture.view),
        shard="",
        offset=0,
        size=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        rows=picture.rows,
        cols=picture.cols,
        references=[grid for grid, _ in picture.references],
        text_tokens=[len(ids) for ids in wording.ids],
        captions=wording.captions,
        mirrored=task.mirrored,
        caption_sha256=hash_of_captions(wording.captions),
        embeds_sha256=tokens.embeds_sha256(),
        source=task.source,
        view=picture.view,
        style=task.look.style,
        tags=task.look.tags,
        note="; ".join(filter(None, [pictures.note, wording.note])) or None,
        image_sha256=pictures.sha256,
        recipe=recipe_of(task.recipe, picture.view),
    )
    return info, payload


def make_pair(
    task: Task, pictures: Pictures, picture: Picture, wording: Wording, texts: Texts, eyes: Eyes
) -> tuple[SampleInfo, bytes]:
    """`make_sample` of a picture with references: its prompts have room for what the visual tower makes of these,
    which depends on their sizes, and an empty one that has comes after them. Skip where they leave too little for a
    caption."""
    grids = eyes.grids_of([(cols * PATCH, rows * PATCH) for (rows, cols), _ in picture.references])
    all_ids = [texts.beside(caption, grids) for caption in (*wording.captions, UNCONDITIONAL_PROMPT)]
    info, payload = make_sample(
        task, pictures, picture, replace(wording, ids=all_ids[:-1]), texts.tokens(all_ids)
    )
    seen = texts.encoder.seen(all_ids[-1], grids)  # the same in all of them: images come first
    return replace(info, seen=list(seen), empty_tokens=len(all_ids[-1])), payload


def key_of(source: str, view: str | None) -> str:
    """A WebDataset key (no dots, no slashes): readable, unique, the same in every run, shorter than 80."""
    stem = NOT_IN_KEYS.sub("_", os.path.splitext(os.path.basename(source))[0])[:40]
    image = f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:12]}"
    return f"{image}-{view}" if view else image


@contextmanager
def writing(writer: ShardWriter) -> Iterator[None]:
    """Leave no half-written shard behind, and say what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        raise HdlError(
            f"{writer.folder}: writing stopped ({error.strerror or error}); make room or repair access and "
            "run again: finished shards are kept and reused"
        ) from error
    finally:
        writer.abandon()
