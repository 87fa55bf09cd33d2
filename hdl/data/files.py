"""Which files of a folder are images, and in which order they are taken."""

import os
from dataclasses import dataclass
from pathlib import Path

from hdl.data.captions import STYLES_FILE
from hdl.data.images import SUFFIXES, Skip
from hdl.errors import HdlError


@dataclass(frozen=True)
class Folder:
    """The images of a folder, paths relative to it with forward slashes, sorted; and what else lies there."""

    root: Path
    images: list[str]
    skips: dict[str, Skip]  # path -> why it is not used


def list_folder(root: Path, leave_out: Path) -> Folder:
    """All files below `root` in any depth, hidden ones and the folder `leave_out` aside.

    Links are followed to files inside `root` only. HdlError where there is no such folder or no image in it.
    """
    if not root.exists():
        raise HdlError(f"{root}: no such folder; expected a folder of images with .txt captions beside them")
    if not root.is_dir():
        raise HdlError(f"{root}: not a folder; expected a folder of images with .txt captions beside them")
    images, texts, skips = [], [], {}
    for path, relative in _files(root, leave_out):
        suffix = path.suffix.lower()
        if path.is_symlink() and not _inside(path, root):
            skips[relative] = Skip("link leading out", "a symbolic link that leads out of the images folder")
        elif path.is_dir():
            skips[relative] = Skip("linked folder", "a symbolic link to a folder; folders are not followed")
        elif suffix in SUFFIXES:
            images.append(relative)
        elif suffix == ".txt":
            texts.append(relative)
        elif relative != STYLES_FILE:
            skips[relative] = Skip("not an image", f"not an image ({' '.join(SUFFIXES)}) nor a .txt caption")
    captions = {os.path.splitext(image)[0] + ".txt" for image in images}
    for text in texts:
        if text not in captions:
            skips[text] = Skip("caption without image", "a caption with no image of the same name beside it")
    if not images:
        raise HdlError(
            f"{root}: no image there in any depth (other files: {len(skips)}); expected files in "
            f"{' '.join(SUFFIXES)} with .txt captions beside them"
        )
    return Folder(root, sorted(images), skips)


def _files(root: Path, leave_out: Path) -> list[tuple[Path, str]]:
    found = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        links = [name for name in subfolders if (here / name).is_symlink()]
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and not _same(here / s, leave_out)]
        found += [here / name for name in names + links if not name.startswith(".")]
    return [(path, path.relative_to(root).as_posix()) for path in found]


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()
