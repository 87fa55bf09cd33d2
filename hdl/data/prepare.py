"""From a folder of images and captions to a folder of shards.

For each image in order: find its caption, ask whether an earlier run already made this very sample, and if
not decode, resize and patchify it. Images stream through; memory does not grow with their number. What an
earlier run made from the same bytes, caption, options and base is taken over without decoding, also when
that run was killed before it finished.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hdl.data.captions import CaptionOptions, Look, check_options, compose, read_caption, read_styles
from hdl.data.files import Folder, list_folder
from hdl.data.images import Job, Picture, Skip, picture_or_skip
from hdl.data.samples import Prompt, SampleInfo, hash_of_captions, hash_of_embeds, payload_of
from hdl.data.shard_writer import OWN, SHARD_BYTES, Earlier, ShardWriter, read_earlier
from hdl.data.shards import (
    INDEX_FILE,
    VERSION,
    bucket_counts,
    check_base,
    read_index,
    write_durably,
)
from hdl.data.workers import in_order
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.patches import PATCH, patchify
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder


@dataclass(frozen=True)
class Options:
    """area: side in px of the square whose area no bucket exceeds. allow_upscaling: enlarge small images."""

    area: int = 1024
    allow_upscaling: bool = False
    captions: CaptionOptions = field(default_factory=CaptionOptions)


@dataclass(frozen=True)
class Task:
    """One image with a good caption, on its way to become a sample."""

    source: str
    caption: str
    look: Look
    ids: list[int]
    recipe: str
    earlier: SampleInfo | None
    job: Job


@dataclass
class Summary:
    """What a run did. Paths in `skips` and `notes` are relative to `images`."""

    images: Path
    out: Path
    shards: int = 0
    reused: int = 0
    new: int = 0
    removed: int = 0
    buckets: dict[tuple[int, int], int] = field(default_factory=dict)
    skips: dict[str, Skip] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def skips_by_kind(self) -> dict[str, int]:
        return dict(Counter(skip.kind for skip in self.skips.values()).most_common())


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
    and where no image is usable. A single bad file is skipped and reported, never an error.
    """
    images, out = Path(images), Path(out)
    if options.area < PATCH:
        raise HdlError(f"--area: found {options.area}, expected at least {PATCH} (pixels, one patch)")
    if workers < 0:
        raise HdlError(f"--workers: found {workers}, expected 0 (decode in this process) or more")
    folder = list_folder(images, leave_out=out)
    styles = read_styles(images, folder.images)
    check_options(options.captions, styles)
    index = claim_output(out)
    checkpoint = open_checkpoint(base, config_from, random_init)
    encoder = PromptEncoder(checkpoint)
    fingerprint = checkpoint.fingerprint()
    if index:
        check_base(out, index, fingerprint)
    earlier = read_earlier(out, index)
    check_same_images(out, earlier, folder)

    summary = Summary(images, out, skips=dict(folder.skips))
    writer = ShardWriter(out, earlier, shard_bytes)
    with writing(writer):
        tasks = plan(folder, styles, options, encoder, fingerprint, earlier, summary)
        for task, result in in_order(picture_or_skip, ((task, task.job) for task in tasks), workers):
            if isinstance(result, Skip):
                summary.skips[task.source] = result
                continue
            image_sha256, picture = result
            if picture is None:
                assert task.earlier is not None
                writer.reuse(task.earlier)
                summary.reused += 1
            else:
                writer.add(*make_sample(task, image_sha256, picture, encoder))
                summary.new += 1
        if not summary.new + summary.reused:
            raise nothing_usable(summary)
        empty_ids = encoder.ids(UNCONDITIONAL_PROMPT)
        writer.finish(
            base={"fingerprint": fingerprint, "hidden_size": checkpoint.config.hidden_size},
            options=asdict(options),
            empty=payload_of([prompt(encoder, empty_ids)]),
            empty_tokens=len(empty_ids),
        )
        summary.removed = len(earlier.finished_sources.difference(info.source for info in writer.infos))
        summary.shards = len(writer.shards)
        summary.buckets = bucket_counts(writer.infos)
        summary.notes = {info.source: info.note for info in writer.infos if info.note}
        write_report(summary)
    return summary


def claim_output(out: Path) -> dict[str, Any] | None:
    """Make sure that `out` can be written and holds nothing but shards; the index it has, if any."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f"{INDEX_FILE}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise HdlError(
            f"{out}: the output folder cannot be written ({error.strerror}: {error.filename}); "
            "name a folder in a place that you may write to"
        ) from None
    if (out / INDEX_FILE).exists():
        return read_index(out)
    strangers = sorted(path.name for path in out.iterdir() if not OWN.fullmatch(path.name))
    if strangers:
        raise HdlError(
            f"{out}: the output folder holds something that is not hdl shards ({', '.join(strangers[:4])}"
            f"{', …' if len(strangers) > 4 else ''}); name a new or empty folder"
        )
    return None


def check_same_images(out: Path, earlier: Earlier, folder: Folder) -> None:
    """HdlError where `out` was made from images of which not one is here."""
    if earlier.finished_sources and earlier.finished_sources.isdisjoint(folder.images):
        raise HdlError(
            f"{out}: holds shards of other images ({min(earlier.finished_sources)}, …), none of which is in "
            f"{folder.root}; name a new folder, or delete this one to replace them"
        )


def plan(
    folder: Folder,
    styles: dict[str, Look],
    options: Options,
    encoder: PromptEncoder,
    fingerprint: str,
    earlier: Earlier,
    summary: Summary,
) -> Iterator[Task]:
    """The images with good captions, one by one; the others go to the summary's skips."""
    known = earlier.by_recipe()
    for source in tqdm(folder.images, desc="preparing", unit="image", disable=None):
        path = folder.root / source
        look = styles.get(source, Look())
        try:
            caption = compose(read_caption(path.with_suffix(".txt")), look, options.captions)
            ids = encode(encoder, caption)
        except Skip as skip:
            summary.skips[source] = skip
            continue
        made_from = [
            VERSION,
            fingerprint,
            options.area,
            options.allow_upscaling,
            caption,
            ids,
            look.style,
            look.tags,
        ]
        recipe = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        before = known.get((source, recipe))
        job = Job(str(path), options.area, options.allow_upscaling, before.image_sha256 if before else None)
        yield Task(source, caption, look, ids, recipe, before, job)


def encode(encoder: PromptEncoder, caption: str) -> list[int]:
    """The caption's token ids; Skip where it is too long or would end the prompt by itself."""
    try:
        ids = encoder.ids(caption)
    except HdlError as error:
        raise Skip("caption not usable", f"the caption cannot be used: {error}") from None
    if not set(encoder.image_ids).isdisjoint(ids[: -len(encoder.image_ids)]):
        raise Skip("caption not usable", "the caption holds one of the model's own special tokens; remove it")
    return ids


def make_sample(
    task: Task, image_sha256: str, picture: Picture, encoder: PromptEncoder
) -> tuple[SampleInfo, bytes]:
    """A task and its picture -> the sample's line (shard and offset still open) and its safetensors bytes."""
    prompts = [prompt(encoder, task.ids)]
    payload = payload_of(prompts, patchify(torch.from_numpy(picture.pixels.copy())))
    info = SampleInfo(
        key=key_of(task.source),
        shard="",
        offset=0,
        size=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        rows=picture.rows,
        cols=picture.cols,
        references=[],
        text_tokens=[len(task.ids)],
        captions=[task.caption],
        mirrored=False,
        caption_sha256=hash_of_captions([task.caption]),
        embeds_sha256=hash_of_embeds(prompts),
        source=task.source,
        view=None,
        style=task.look.style,
        tags=task.look.tags,
        note=picture.note,
        image_sha256=image_sha256,
        recipe=task.recipe,
    )
    return info, payload


def prompt(encoder: PromptEncoder, ids: list[int]) -> Prompt:
    return Prompt(torch.tensor(ids), encoder.embed(ids))


def key_of(source: str) -> str:
    """A WebDataset key (no dots, no slashes) for an image: readable, unique, the same in every run."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).stem)[:40]
    return f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:12]}"


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


def nothing_usable(summary: Summary) -> HdlError:
    """Writes the report and returns the error that counts the reasons."""
    write_report(summary)
    counts = ", ".join(f"{count} × {kind}" for kind, count in summary.skips_by_kind().items())
    file, skip = min(summary.skips.items())
    return HdlError(
        f"{summary.images}: no usable image with a caption ({counts}); for example {file}: {skip.reason}. "
        f"All of them are listed in {summary.out / 'report.txt'}"
    )


def write_report(summary: Summary) -> None:
    """report.json for programs and report.txt for people, in the output folder."""
    record = {
        "samples": summary.new + summary.reused,
        "reused": summary.reused,
        "new": summary.new,
        "removed": summary.removed,
        "counts": summary.skips_by_kind(),
        "skipped": [
            {"file": f, "kind": s.kind, "reason": s.reason} for f, s in sorted(summary.skips.items())
        ],
        "notes": [{"file": f, "note": note} for f, note in sorted(summary.notes.items())],
    }
    write_durably(summary.out / "report.json", json.dumps(record, indent=1).encode())
    lines = [describe(summary), ""]
    lines += [f"skipped {file}: {skip.reason}" for file, skip in sorted(summary.skips.items())]
    lines += [f"note    {file}: {note}" for file, note in sorted(summary.notes.items())]
    write_durably(summary.out / "report.txt", ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def describe(summary: Summary) -> str:
    """The last words of a run: what was taken, the buckets, what was skipped, where things are."""
    lines = [
        f"{summary.new + summary.reused} samples in {summary.shards} shard(s): "
        f"reused {summary.reused}, new {summary.new}, removed {summary.removed}"
    ]
    if summary.buckets:
        lines.append("  width x height   patches   samples")
    for (rows, cols), count in summary.buckets.items():
        lines.append(f"  {cols * PATCH:5} x {rows * PATCH:<6} {rows * cols:9} {count:9}")
    for kind, count in summary.skips_by_kind().items():
        lines.append(f"skipped {count} × {kind}")
    if summary.shards:
        lines.append(f"shards: {summary.out}   report: {summary.out / 'report.txt'}")
    return "\n".join(lines)
