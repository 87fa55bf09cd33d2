"""Whether all ranks of a job run the same thing: the same config, the same code, clocks that are not far apart.

Ranks that differ would wait for each other in different collectives, or train on different data without a word.
"""

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from hdl.config import Run
from hdl.engine.processes import Processes
from hdl.errors import HdlError

SKEW = 60.0  # seconds between clocks that are worth a word


@dataclass(frozen=True)
class Account:
    """What a rank is about to do."""

    host: str
    clock: float
    code: dict[str, str]
    config: dict[str, Any]


def check_alike(run: Run, processes: Processes) -> None:
    """HdlError on every rank when configs or versions differ; a line from rank 0 when clocks do.

    Nothing in hdl goes by a clock, but who reads the logs of several machines does.
    """
    accounts = processes.gather(account(run))
    if difference := first_difference(accounts):
        raise HdlError(difference, on_all_ranks=True)
    skew = max(a.clock for a in accounts) - min(a.clock for a in accounts)
    if processes.is_main and skew > SKEW:
        early, late = (accounts.index(f(accounts, key=lambda a: a.clock)) for f in (min, max))
        print(
            f"warning: the clock of rank {late} ({accounts[late].host}) is {skew:.0f} s ahead of that of rank {early} "
            f"({accounts[early].host}), or that rank came so much later; training does not depend on it"
        )


def account(run: Run) -> Account:
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    return Account(
        platform.node(), time.time(), versions | {"hdl's source": _source()}, run.model_dump(mode="json")
    )


def first_difference(accounts: Sequence[Account]) -> str | None:
    """In words; None when all ranks are alike."""
    first, others = accounts[0], accounts[1:]
    for rank, other in enumerate(others, start=1):
        for name, here in first.code.items():
            if other.code[name] != here:
                return (
                    f"rank {rank} ({other.host}) runs another version of {name} than rank 0 ({first.host}): "
                    f"{other.code[name]} and {here}; install the same everywhere"
                )
        mine, theirs = _flat(first.config), _flat(other.config)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return (
                    f"rank {rank} ({other.host}) has {name} {theirs.get(name)}, rank 0 ({first.host}) has "
                    f"{mine.get(name)}; start every rank with the same config and flags"
                )
    return None


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _source() -> str:
    """A hash of the package's files: installed or checked out, committed or not."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
