"""What the tool wrote before: which captions are its own, and the answers they were made of.

IMAGES/.captions.jsonl has a line for every caption ever written, appended before the caption itself appears. A
caption whose text is on record is the tool's own; any other was written or edited by a person and is theirs. Killed
between the two, the tool finds an answer without its caption and writes it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hdl.caption.question import Answer, Question
from hdl.data.captions import read_caption
from hdl.data.images import Skip
from hdl.errors import HdlError

RECORDS_FILE = ".captions.jsonl"  # hidden files are none of tools/prepare.py's business
MISSING, OWN, BY_HAND = "missing", "own", "by hand"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def temporary_of(path: Path) -> Path:
    """Where a caption is written before it is in place: a name of its own, and no longer, as names have a longest."""
    return path.with_name(f".{sha256(path.name)[:16]}.tmp")


class Records:
    """The records of an images folder. HdlError where they cannot be read or the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORDS_FILE
        self.own: set[tuple[str, str]] = set()  # file, sha256 of a text that the tool wrote there
        self.answers: dict[tuple[str, str], Answer] = {}  # file, recipe
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            lines = self.path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # killed while writing it
                os.write(self.descriptor, b"\n")
        except OSError as error:
            raise HdlError(
                f"{self.path}: the records of captions cannot be written ({error.strerror}); captions are "
                "written beside the images, so give a folder that you may write to"
            ) from None
        for line in lines:
            self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            record: dict[str, Any] = json.loads(line)
            answer = Answer(record["answer"], record["cut"])
            self.own.add((record["file"], record["caption_sha256"]))
            self.answers[record["file"], record["recipe"]] = answer
        except (ValueError, KeyError, TypeError):
            pass  # a line cut off by a kill: its caption was not written

    def state(self, path: Path, file: str) -> tuple[str, str]:
        """(missing, own or by hand; the text) of the caption at `path`. An empty file is missing."""
        try:
            text = read_caption(path)
        except Skip as skip:
            return (MISSING if skip.kind in ("no caption", "empty caption") else BY_HAND), ""
        return (OWN if (file, sha256(text)) in self.own else BY_HAND), text

    def write(self, question: Question, path: Path, answer: Answer, caption: str, model: str) -> None:
        """Record the caption and put it in place: complete, or not at all. OSError where that fails."""
        record = {
            "file": question.file,
            "image": question.source,
            "image_sha256": question.image_sha256,
            "model": model,
            "prompt_sha256": sha256(question.prompt),
            "recipe": question.recipe,
            "caption_sha256": sha256(caption),
            "cut": answer.cut,
            "answer": answer.text,
        }
        # One write in append mode: lines of several ranks do not mix. ASCII, so that any answer can be written.
        os.write(self.descriptor, (json.dumps(record) + "\n").encode())
        os.fsync(self.descriptor)
        temporary = temporary_of(path)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(caption + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
