"""Which files of a folder are images, in which order they are taken, and which captions and references are whose.

Beside an image `a.png` lie its caption `a.txt`, further captions of it, `a.1.txt`, `a.2.txt`, ..., and where it is
the target of an edit the picture(s) it was made from, `a.ref.png` or `a.ref1.png`, `a.ref2.png`, .... Gaps in the
captions' numbers do not matter. An image that is really called `a.1.png` owns `a.1.txt`, and `a.ref.png` with
an `a.ref.txt` is an image like any other.

Unusual: names are kept as plain strings, and what belongs to an image is looked up only when it is its turn:
a folder may hold millions.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hdl.data.captions import STYLES_FILE
from hdl.data.images import SUFFIXES, Skip
from hdl.errors import HdlError

FURTHER = re.compile(r"(.+)\.([0-9]+)", re.DOTALL)
REFERENCE = re.compile(r"(.+)\.ref([0-9]*)", re.DOTALL)


@dataclass(frozen=True)
class Folder:
    """The images of a folder, paths relative to it with forward slashes, sorted; and what else lies there."""

    root: Path
    images: list[str]
    skips: dict[str, Skip]  # path -> why it is not used
    texts: set[str] = field(default_factory=set)
    further: dict[str, list[int]] = field(default_factory=dict)  # path without suffix -> numbers
    references: dict[str, list[str]] = field(default_factory=dict)  # path without suffix -> pictures

    def captions_of(self, image: str) -> list[str]:
        """The image's caption files, `a.txt` first."""
        stem = os.path.splitext(image)[0]
        first = [f"{stem}.txt"] if f"{stem}.txt" in self.texts else []
        return first + [f"{stem}.{number}.txt" for number in self.further.get(stem, [])]

    def references_of(self, image: str) -> list[str]:
        """The pictures that the image was made from, in order; none: it is no target of an edit.

        Skip where one of them is missing or not usable.
        """
        numbered: dict[int, str] = {}
        for path in self.references.get(os.path.splitext(image)[0], []):
            if path in self.skips:
                raise Skip("bad reference", f"its reference {_name(path)}: {self.skips[path].reason}")
            number = int(_reference(path)[1] or 1)
            if number in numbered:
                raise Skip(
                    "bad reference",
                    f"{_name(numbered[number])} and {_name(path)} are both its reference {number}; rename one",
                )
            numbered[number] = path
        for number in range(1, len(numbered) + 1):
            if number not in numbered:
                raise Skip(
                    "bad reference",
                    f"its reference {number} is missing: there are {', '.join(map(_name, numbered.values()))}; "
                    "number them from 1",
                )
        return [numbered[number] for number in sorted(numbered)]


def list_folder(root: Path, leave_out: Path) -> Folder:
    """All files below `root` in any depth, hidden ones and the folder `leave_out` aside.

    Links are followed to files inside `root` only. HdlError where there is no such folder or no image in it.
    """
    if not root.exists():
        raise HdlError(f"{root}: no such folder; expected a folder of images with .txt captions beside them")
    if not root.is_dir():
        raise HdlError(f"{root}: not a folder; expected a folder of images with .txt captions beside them")
    images: list[str] = []
    texts: set[str] = set()
    skips: dict[str, Skip] = {}
    unusable: list[str] = []  # named like images
    for relative, entry in _files(root, leave_out, skips):
        suffix = os.path.splitext(relative)[1].lower()
        if (skip := _no_file(entry, root)) is not None:
            skips[relative] = skip
            if suffix in SUFFIXES:
                unusable.append(relative)
        elif suffix in SUFFIXES:
            images.append(relative)
        elif relative.endswith(".txt"):
            texts.add(relative)
        elif relative != STYLES_FILE:
            skips[relative] = Skip("not an image", f"not an image ({' '.join(SUFFIXES)}) nor a .txt caption")
    if "" in skips:
        raise HdlError(f"{root}: {skips[''].reason}")
    images, references = _part_references(images, unusable, texts)
    further = _assign_texts(images, texts, skips)
    if not images:
        raise HdlError(
            f"{root}: no image there in any depth (other files: {len(skips)}); expected files in "
            f"{' '.join(SUFFIXES)} with .txt captions beside them"
        )
    return Folder(root, sorted(images), skips, texts, further, references)


def _files(root: Path, leave_out: Path, skips: dict[str, Skip]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is no folder, with its path relative to `root`. Folders that cannot be read go to the skips."""
    left_out = leave_out.resolve()
    waiting = [""]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(root / here) as entries:
                found = list(entries)
        except OSError as error:
            skips[here] = Skip("unreadable folder", f"the folder cannot be read ({error.strerror})")
            continue
        for entry in found:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield here + entry.name, entry
            elif Path(entry.path).resolve() != left_out:
                waiting.append(f"{here}{entry.name}/")


def _no_file(entry: os.DirEntry[str], root: Path) -> Skip | None:
    """Why this is not to be opened, if so. Opening a pipe or device may wait for ever."""
    if entry.is_file(follow_symlinks=False):
        return None
    if entry.is_symlink():
        path = Path(entry.path)
        if not path.resolve().is_relative_to(root.resolve()):
            return Skip("link leading out", "a symbolic link that leads out of the images folder")
        if path.is_dir():
            return Skip("linked folder", "a symbolic link to a folder; folders are not followed")
        if not path.exists():
            return Skip("broken link", "a symbolic link to a file that is not there")
        if path.is_file():
            return None
    return Skip("not a file", "a pipe, socket or device, not a file")


def _part_references(
    images: list[str], unusable: list[str], texts: set[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Images that are references of others, apart: (the other images, target's path without suffix -> its own)."""
    stems = {os.path.splitext(image)[0] for image in images}
    references: dict[str, list[str]] = {}
    rest = []
    for path in images + unusable:
        stem = os.path.splitext(path)[0]
        match = REFERENCE.fullmatch(stem)
        if match and match[1] in stems and f"{stem}.txt" not in texts:
            references.setdefault(match[1], []).append(path)
        else:
            rest.append(path)
    dropped = set(unusable)
    return [path for path in rest if path not in dropped], {stem: sorted(r) for stem, r in references.items()}


def _assign_texts(images: list[str], texts: set[str], skips: dict[str, Skip]) -> dict[str, list[int]]:
    """Numbers of the images' further captions; the texts that are nobody's go to the skips."""
    stems = {os.path.splitext(image)[0] for image in images}
    further: dict[str, list[int]] = {}
    for text in texts:
        stem = text[: -len(".txt")]
        if stem in stems:
            continue
        match = FURTHER.fullmatch(stem)
        if match and match[1] in stems and match[2] == str(int(match[2])):
            further.setdefault(match[1], []).append(int(match[2]))
        else:
            skips[text] = Skip("caption without image", "a caption with no image of the same name beside it")
    for numbers in further.values():
        numbers.sort()
    return further


def _reference(path: str) -> tuple[str, str]:
    match = REFERENCE.fullmatch(os.path.splitext(path)[0])
    assert match
    return match[1], match[2]


def _name(path: str) -> str:
    return path.rpartition("/")[2]
