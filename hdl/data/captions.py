"""From caption files and styles.json to the captions each image is trained with.

A caption is a `.txt` beside the image. Around it, by option, go the trigger phrase (in front) and the
words that describe the image's style and tags (behind). A phrase that the caption already holds is not
put there twice. A style set is best mixed with plain pictures whose captions lack the trigger, or the
adapter learns the look without its gate: that is what limiting the trigger to some styles or tags is for.
By option a caption is also given with its sentences in other orders (hdl/data/sentences.py).
"""

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from hdl.data.images import Skip
from hdl.data.sentences import reordered
from hdl.errors import HdlError

STYLES_FILE = "styles.json"
MAX_NAMED = 8
USUAL_TEXT_TAG = "text"  # of pictures that are never mirrored, unless told otherwise
MAX_CAPTION_BYTES = 64 * 1024  # no text of more bytes has as few tokens as go in front of an image
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # without white space
# A picture that shows any of these is wrong the other way round.
DIRECTED = re.compile(
    r"\b(texts?|letter(s|ing)?|(hand)?writing|written|signs?|signage|logos?|left|right)\b"
    r"|\"[^\"]+\"|“[^”]+”|„[^“”]+[“”]|«[^»]+»",
    re.IGNORECASE,
)


class Look(BaseModel):
    """What styles.json says of one image; a plain string there means its style."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    style: str | None = None
    tags: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def style_alone(cls, value: Any) -> Any:
        return {"style": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are put together.

    trigger: phrase put in front of captions. trigger_styles, trigger_tags: when any is given, only images of
    these styles or with these tags get the trigger; otherwise every image does. style_descriptors,
    tag_descriptors: style or tag -> words put behind the captions of the images that have it. orders: up to so
    many further captions of each, its sentences in another order.
    """

    trigger: str | None = None
    trigger_styles: tuple[str, ...] = ()
    trigger_tags: tuple[str, ...] = ()
    style_descriptors: dict[str, str] = field(default_factory=dict)
    tag_descriptors: dict[str, str] = field(default_factory=dict)
    orders: int = 0


def read_caption(path: Path) -> str:
    """The text of a caption file, stripped, without control characters. Skip where it is missing, no plain file,
    too long, not UTF-8 or empty."""
    return read_caption_noting(str(path))[0]


def read_caption_noting(path: str) -> tuple[str, str | None]:
    """`read_caption`, and a note for the report where control characters were removed."""
    name = os.path.basename(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Skip(
                "unreadable caption", f"the caption {name} is a folder, pipe, socket or device, not a file"
            )
        if status.st_size > MAX_CAPTION_BYTES:
            raise Skip(
                "caption too long",
                f"the caption {name} has {status.st_size:,} bytes, more than any prompt may have "
                f"({MAX_CAPTION_BYTES:,}); shorten it",
            )
        with open(path, "rb", buffering=0) as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise no_caption(name) from None
    except OSError as error:
        raise Skip("unreadable caption", f"the caption {name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise Skip(
            "caption not UTF-8",
            f"the caption {name} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}); save it as UTF-8",
        ) from None
    text, removed = CONTROL.subn("", text)
    if not (text := text.strip()):
        raise Skip("empty caption", f"the caption {name} is empty")
    return text, f"{removed} control character(s) removed from {name}" if removed else None


def no_caption(name: str) -> Skip:
    return Skip("no caption", f"there is no caption: expected a file {name} beside the image")


def captions_of(paths: list[str], look: Look, options: CaptionOptions) -> tuple[list[str], list[str]]:
    """(the different captions of an image from its caption files, notes on files that could not be used).

    Skip, for the first file's reason, where no file is good.
    """
    captions: dict[str, None] = {}
    notes = []
    first: Skip | None = None
    for path in paths:
        try:
            text, note = read_caption_noting(path)
        except Skip as skip:
            first = first or skip
            notes.append(skip.reason)
            continue
        notes += [note] if note else []
        captions[compose(text, look, options)] = None
        if options.orders:
            lead, body = parts_of(text, look, options)
            for other in reordered(body, options.orders):
                captions[compose(lead + other, look, options)] = None
    if not captions:
        assert first is not None
        raise first
    return list(captions), notes


def parts_of(text: str, look: Look, options: CaptionOptions) -> tuple[str, str]:
    """(the trigger that the text already starts with or nothing, its sentences). Descriptors that it already
    ends with are left out: `compose` puts them behind whatever sentence comes last."""
    lead, body = "", text
    if options.trigger and (match := re.match(rf"{re.escape(options.trigger)}\W+", text, re.IGNORECASE)):
        lead, body = text[: match.end()], text[match.end() :]
    known = "|".join(re.escape(words) for words in descriptors_of(look, options))
    if known:
        body = re.sub(rf"(\s*[,;]\s*({known}))+\W*$", "", body, flags=re.IGNORECASE)
    return lead, body


def descriptors_of(look: Look, options: CaptionOptions) -> list[str]:
    words = [options.style_descriptors.get(look.style or "")]
    words += [options.tag_descriptors.get(tag) for tag in look.tags]
    return [w for w in words if w]


def compose(text: str, look: Look, options: CaptionOptions) -> str:
    """The caption of one image: trigger, text, style's words, tags' words, parted by commas."""
    caption = text
    for words in descriptors_of(look, options):
        if not holds(caption, words):
            caption = f"{caption.rstrip('.,;')}, {words}"
    if options.trigger and triggered(look, options) and not holds(caption, options.trigger):
        caption = f"{options.trigger}, {caption}"
    return caption


def may_mirror(captions: list[str], tags: list[str], keep_direction: tuple[str, ...]) -> bool:
    """Whether an image may be trained mirrored, by all that is known of it.

    It may not where a tag of `keep_direction` says so, or where a caption quotes words, mentions text, letters,
    writing, signs or logos, or says what is left or right: mirrored, the picture or the caption would be wrong.
    """
    if not set(tags).isdisjoint(keep_direction):
        return False
    return not any(DIRECTED.search(caption) for caption in captions)


def triggered(look: Look, options: CaptionOptions) -> bool:
    """Whether the image is one that gets the trigger."""
    if not options.trigger_styles and not options.trigger_tags:
        return True
    return look.style in options.trigger_styles or not set(look.tags).isdisjoint(options.trigger_tags)


def holds(caption: str, phrase: str) -> bool:
    """Whether the phrase stands in the caption as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption, re.IGNORECASE) is not None


def read_styles(folder: Path, images: list[str]) -> dict[str, Look]:
    """styles.json of an images folder: image (path relative to the folder) -> Look; {} without the file.

    HdlError where the file is malformed or names images that are not there.
    """
    path = folder / STYLES_FILE
    try:
        if not path.exists():
            return {}
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise HdlError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise HdlError(f"{path}: not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise HdlError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise HdlError(f"{path}: {error}") from None
    try:
        styles = TypeAdapter(dict[str, Look]).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = " → ".join(str(part) for part in first["loc"]) or "the whole file"
        raise HdlError(
            f"{path}: {where}: {first['msg']}; expected an object of file names, each with its style as a "
            'string or a record {"style": "…", "tags": ["…"]}'
        ) from None
    missing = sorted(set(styles).difference(images))
    if missing:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        raise HdlError(
            f"{path}: names {len(missing)} file(s) that are not images in {folder}: "
            f"{', '.join(missing[:MAX_NAMED])}{more}; "
            "write each path relative to the folder, or remove the entry"
        )
    return styles


def check_options(
    options: CaptionOptions, styles: dict[str, Look], keep_direction: tuple[str, ...] = ()
) -> None:
    """HdlError where the options contradict each other or name a style or tag that no image has."""
    if not options.trigger and (options.trigger_styles or options.trigger_tags):
        raise HdlError(
            "--trigger-styles and --trigger-tags say where the trigger goes, but there is no --trigger"
        )
    if options.trigger is not None and not options.trigger.strip():
        raise HdlError(f"--trigger {options.trigger!r}: no phrase; give one, or leave --trigger out")
    known_styles = {look.style for look in styles.values() if look.style}
    known_tags = {tag for look in styles.values() for tag in look.tags}
    for option, names, known in (
        ("--trigger-styles", options.trigger_styles, known_styles),
        ("--style-descriptor", options.style_descriptors, known_styles),
        ("--trigger-tags", options.trigger_tags, known_tags),
        ("--tag-descriptor", options.tag_descriptors, known_tags),
        ("--keep-direction", [tag for tag in keep_direction if tag != USUAL_TEXT_TAG], known_tags),
    ):
        for name in names:
            if name not in known:
                raise HdlError(
                    f"{option}: no image in {STYLES_FILE} has {name!r}; "
                    f"it knows {', '.join(sorted(known)) or 'none at all'}"
                )


def parse_descriptors(items: list[str], option: str) -> dict[str, str]:
    """["nsfw=explicit content", …] as given on a command line -> {"nsfw": "explicit content", …}."""
    descriptors = {}
    for item in items:
        name, equals, words = item.partition("=")
        if not equals or not name.strip() or not words.strip():
            raise HdlError(
                f'{option}: found {item!r}, expected NAME=WORDS, for example night="dark blue light"'
            )
        descriptors[name.strip()] = words.strip()
    return descriptors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    doubled = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if doubled:
        raise ValueError(f"the same name twice: {', '.join(doubled[:MAX_NAMED])}; keep one entry of each")
    return dict(pairs)
