"""From caption files and styles.json to the one caption each image is trained with.

The caption is the `.txt` beside the image. Around it, by option, go the trigger phrase (in front) and the
words that describe the image's style and tags (behind). A phrase that the caption already holds is not
put there twice. A style set is best mixed with plain pictures whose captions lack the trigger, or the
adapter learns the look without its gate: that is what limiting the trigger to some styles or tags is for.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from hdl.data.images import Skip
from hdl.errors import HdlError

STYLES_FILE = "styles.json"
MAX_NAMED = 8


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
    tag_descriptors: style or tag -> words put behind the captions of the images that have it.
    """

    trigger: str | None = None
    trigger_styles: tuple[str, ...] = ()
    trigger_tags: tuple[str, ...] = ()
    style_descriptors: dict[str, str] = field(default_factory=dict)
    tag_descriptors: dict[str, str] = field(default_factory=dict)


def read_caption(path: Path) -> str:
    """The text of a caption file, stripped. Skip where it is missing, not UTF-8 or empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        raise Skip(
            "no caption", f"there is no caption: expected a file {path.name} beside the image"
        ) from None
    except OSError as error:
        raise Skip(
            "unreadable caption", f"the caption {path.name} cannot be read ({error.strerror})"
        ) from None
    except UnicodeDecodeError as error:
        raise Skip(
            "caption not UTF-8",
            f"the caption {path.name} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}); save it as UTF-8",
        ) from None
    if not text:
        raise Skip("empty caption", f"the caption {path.name} is empty")
    return text


def compose(text: str, look: Look, options: CaptionOptions) -> str:
    """The caption of one image: trigger, text, style's words, tags' words, parted by commas."""
    caption = text
    descriptors = [options.style_descriptors.get(look.style or "")]
    descriptors += [options.tag_descriptors.get(tag) for tag in look.tags]
    for words in descriptors:
        if words and not holds(caption, words):
            caption = f"{caption.rstrip('.,;')}, {words}"
    if options.trigger and triggered(look, options) and not holds(caption, options.trigger):
        caption = f"{options.trigger}, {caption}"
    return caption


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
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise HdlError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise HdlError(f"{path}: not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise HdlError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except ValueError as error:
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


def check_options(options: CaptionOptions, styles: dict[str, Look]) -> None:
    """HdlError where the options contradict each other or name a style or tag that no image has."""
    if not options.trigger and (options.trigger_styles or options.trigger_tags):
        raise HdlError(
            "--trigger-styles and --trigger-tags say where the trigger goes, but there is no --trigger"
        )
    known_styles = {look.style for look in styles.values() if look.style}
    known_tags = {tag for look in styles.values() for tag in look.tags}
    for option, names, known in (
        ("--trigger-styles", options.trigger_styles, known_styles),
        ("--style-descriptor", options.style_descriptors, known_styles),
        ("--trigger-tags", options.trigger_tags, known_tags),
        ("--tag-descriptor", options.tag_descriptors, known_tags),
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
