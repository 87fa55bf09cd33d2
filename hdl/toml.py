"""Configs in TOML, and names in them that are nearly right; shared by all that a person describes in a file."""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hdl.errors import HdlError


def read_toml(file: Path, describes: str) -> dict[str, Any]:
    """The file's tables. describes: what it says, for the error where there is none ("describes the run")."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HdlError(f"{file}: no such config; give a TOML file that {describes}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HdlError(f"{file}: not readable as TOML ({error})") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put behind an error, where a known name is close to this one; else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
