"""Runs of studies side by side, in processes of their own: the small O1 leaves most of a GPU idle.

Each process takes the next run as it is done with one, and writes what it says into a file of its own. What a run came to
does not depend on what ran beside it, but its seconds a step do.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from hdl.data.workers import live_and_die_with_parent
from hdl.engine.processes import DESCRIBED, Processes, process_group
from hdl.errors import HdlError
from hdl.study.run import Setting, Study, kept_in, prepared_set, runs_of, write_table

LOGS = "logs"
_entered = ExitStack()  # a worker's process group, until it ends


def run_side_by_side(
    out: Path, names: Sequence[str], setting: Setting, seeds: Sequence[int], at_once: int
) -> Iterator[str]:
    """The studies' tables. HdlError for a run that ended with an error, once all others are done."""
    for name in names:
        prepared_set(out, name)  # one of them, before several would at once
    (out / LOGS).mkdir(exist_ok=True)
    arms = {name: runs_of(name, torch.cuda.is_available()) for name in names}
    threads = max(1, (os.cpu_count() or 1) // at_once)
    with ProcessPoolExecutor(at_once, get_context("spawn"), _begin, (out / LOGS, threads)) as pool:
        runs: dict[Path, tuple[str, str, int]] = {}
        for name in names:
            for arm, seed in product(arms[name], seeds):
                runs.setdefault(kept_in(out, name, arm, seed), (name, arm, seed))
        asked: dict[Future[None], str] = {
            pool.submit(_one, out, setting, *run): "{}, {}, seed {}".format(*run) for run in runs.values()
        }
        failed = {}
        for done, future in enumerate(as_completed(asked), 1):
            error = future.exception()
            print(
                f"{done} of {len(asked)}: {asked[future]}{': failed' if error else ''}",
                file=sys.stderr,
                flush=True,
            )
            if error:
                failed[asked[future]] = error
    if failed:
        which, error = next(iter(failed.items()))
        raise HdlError(
            f"{len(failed)} of {len(asked)} runs failed; {which}: {error or type(error).__name__}; see {out / LOGS}, and start "
            "again to go on with what is left"
        )
    for name in names:
        yield write_table(out, name, arms[name], seeds)


def _begin(logs: Path, threads: int) -> None:
    live_and_die_with_parent()
    log = os.open(logs / f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in DESCRIBED:
        os.environ.pop(name, None)  # each is alone, whatever started this
    torch.set_num_threads(threads)


def _one(out: Path, setting: Setting, name: str, arm: str, seed: int) -> None:
    _study(out, name, setting).one(arm, seed)


@cache
def _study(out: Path, name: str, setting: Setting) -> Study:
    return Study(out, name, setting, _processes())


@cache
def _processes() -> Processes:
    return _entered.enter_context(process_group())
