"""The folder that prepare writes: may it be written, is it shards and of these images, and is nobody else at it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hdl.data.earlier import Earlier, short_hash
from hdl.data.files import Folder
from hdl.data.index import INDEX_FILE
from hdl.data.shard_writer import LOCK_FILE, OWN
from hdl.data.shards import read_index
from hdl.errors import HdlError


@contextmanager
def claimed(out: Path) -> Iterator[dict[str, Any] | None]:
    """Make sure that `out` can be written, holds nothing but shards, and that no other run writes there until
    this context ends. Gives the index it has, if any."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
    except OSError as error:
        raise HdlError(
            f"{out}: the output folder cannot be written ({error.strerror}: {error.filename}); "
            "name a folder in a place that you may write to"
        ) from None
    try:
        yield check_content(out)
    finally:
        (out / LOCK_FILE).unlink(missing_ok=True)
        os.close(lock)


def check_content(out: Path) -> dict[str, Any] | None:
    """The index in `out`, if any; HdlError where there is something else."""
    if (out / INDEX_FILE).exists():
        return read_index(out)
    strangers = sorted(path.name for path in out.iterdir() if not OWN.fullmatch(path.name))
    if strangers:
        raise HdlError(
            f"{out}: the output folder holds something that is not hdl shards ({', '.join(strangers[:4])}"
            f"{', …' if len(strangers) > 4 else ''}); name a new or empty folder"
        )
    return None


def lock_folder(out: Path) -> int:
    """The lock's open file; HdlError where another run has it. A killed run's lock is free at once."""
    path = out / LOCK_FILE
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise HdlError(
                f"{out}: another prepare writes into this folder at this moment; wait until it has ended, or name "
                "another folder"
            ) from None
        except OSError as error:
            # Some network file systems have no locks: then nothing guards against a second run.
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        try:
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # the run that had it removed the file in between: take the new one


def check_same_images(out: Path, earlier: Earlier, folder: Folder) -> None:
    """HdlError where `out` was made from images of which not one is here."""
    if earlier.one_finished is None:
        return
    here = np.fromiter(map(short_hash, folder.images), np.uint64, len(folder.images))
    if not np.isin(here, earlier.finished).any():
        raise HdlError(
            f"{out}: holds shards of other images ({earlier.one_finished}, …), none of which is in "
            f"{folder.root}; name a new folder, or delete this one to replace them"
        )
