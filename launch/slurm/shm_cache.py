"""What a run trains on, by way of a cache in shared memory: shm_cache.py CACHE GIB [train.py arguments ...]

Writes the run, as the arguments describe it, to CACHE/run.toml with CACHE/shards as its data.cache of GIB and
every folder of shards as a pipe that reads it, so that hdl's own cache of what lies elsewhere (hdl/data/cache.py)
serves it too: bounded, checked, fetched once a node and ahead of its use. The same samples come in the same order.
Prints the arguments to train with instead, each ended by a zero byte.
"""

import shlex
import sys
from pathlib import Path

from hdl.config import load_run, save_run
from hdl.data.storage import folder_of, source_of
from hdl.errors import HdlError, command_line


def by_pipe(location: str) -> str:
    """A folder as a pipe that reads it; anything else as it is."""
    if source_of(location, {}) is not None:
        return location
    folder = folder_of(location).resolve()
    if "{file}" in str(folder):
        raise HdlError(
            f"data.shards {folder}: a name with {{file}} in it cannot be cached; rename the folder"
        )
    return f"pipe:cat {shlex.quote(str(folder))}/{{file}}"


def resuming(arguments: list[str]) -> list[str]:
    """--resume and its value: not a part of what describes a run."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        if argument.split("=")[0] in ("--resume", "--no-resume"):
            found += [argument] if "=" in argument or following.startswith("-") else [argument, following]
    return found


def main() -> None:
    folder, gib, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    run = load_run(arguments)
    try:
        size = float(gib)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise HdlError(
            f"SHM_CACHE_GIB is {gib!r}, expected GiB above 0; unset it to read shards from where they are"
        )
    run.data.cache, run.data.cache_gib = folder / "shards", size
    if run.data.shards is not None:
        run.data.shards = by_pipe(run.data.shards)
    for source in run.data.sources.values():
        source.shards = by_pipe(source.shards)
    save_run(run, folder / "run.toml")
    print(*(f"{argument}\0" for argument in [str(folder / "run.toml"), *resuming(arguments)]), sep="", end="")


if __name__ == "__main__":
    command_line(main)
