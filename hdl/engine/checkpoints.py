"""Checkpoints on disk: folders of safetensors and JSON that are either complete or not there.

A checkpoint holds full tensors, so it does not depend on the number of ranks, the ZeRO stage or the optimizer:
resumed with a bfloat16 master, float32 weights are rounded once, and 8-bit moments likewise. Nothing is pickled.
No generator's state is in it, because there is none to keep: all random numbers, the batches and the schedule are
functions of the seed and the step (hdl/seeds.py, hdl/data/batches.py), on every rank.

    adapter_model.safetensors, adapter_config.json   the PEFT adapter: its master weights, in float32
    optimizer.safetensors                            exp_avg and exp_avg_sq of every parameter, float32
    ema.safetensors                                  the average of train.ema, where there is one: as the adapter's file
    trainer_state.json                               the step, what the run was trained on, what was skipped
    config.toml                                      the run's, resolved
    manifest.json                                    size and SHA-256 of all these; written last

A folder `step-000500` is written under a hidden name, flushed to the disk and renamed; one that goes is renamed to a
hidden name before it is deleted. Whenever the machine stops, folders with a proper name are whole, and what is
hidden is swept up by the next start. Order is by step: clocks are not asked.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hdl.adapter.lora import CONFIG_FILE, WEIGHTS_FILE
from hdl.errors import HdlError
from hdl.tensor_files import write_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "ema.safetensors"
STATE_FILE = "trainer_state.json"
RUN_FILE = "config.toml"
MANIFEST_FILE = "manifest.json"
FILES = {WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE, STATE_FILE, RUN_FILE}


class Damaged(HdlError):
    """A checkpoint that cannot be gone on from; the message says what is wrong with it."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_good(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; `say` is told of each newer one, and why it is passed over.

    None when there are no checkpoints; HdlError when there are, and none verifies.
    """
    found = checkpoints(folder)
    wrong = []
    for checkpoint in found:
        try:
            verify(checkpoint)
        except Damaged as error:
            wrong.append(str(error))
            say(f"passed over {error}")
            continue
        return checkpoint
    if found:
        raise HdlError(
            f"{folder} holds no checkpoint that is whole: {'; '.join(wrong)}. Remove {folder} to start over"
        )
    return None


def verify(checkpoint: Path) -> None:
    """Damaged unless every file is there as it was written."""
    try:
        listed = json.loads((checkpoint / MANIFEST_FILE).read_text())
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in listed.items()}
    except FileNotFoundError:
        raise Damaged(f"{checkpoint}: it has no {MANIFEST_FILE}, which is written last") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{checkpoint}: {MANIFEST_FILE} is not readable ({error})") from None
    if missing := FILES - files.keys():
        raise Damaged(f"{checkpoint}: {MANIFEST_FILE} does not list {', '.join(sorted(missing))}")
    for name, (size, digest) in files.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                raise Damaged(f"{checkpoint}: {name} has {found} bytes, expected {size}")
            if sha256(checkpoint / name) != digest:
                raise Damaged(f"{checkpoint}: {name} is not what was written (its SHA-256 differs)")
        except OSError as error:
            raise Damaged(f"{checkpoint}: {name} is not readable ({error})") from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json; Damaged when it is not what this version of hdl writes."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
        return state | {"step": int(state["step"]), "skipped": int(state["skipped"])}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{checkpoint}: {STATE_FILE} is not readable ({error!r})") from None


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    texts: Mapping[str, str],
    tensors: Mapping[str, Mapping[str, Tensor]],
    about: Mapping[str, dict[str, str]] | None = None,
) -> Path:
    """Make folder/step-NNNNNN of files by name; about: what those of tensors say of themselves.

    OSError when it cannot be written; what was there before, one of the same step included, is not touched then.
    """
    final = path_of(folder, step)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, named in tensors.items():
        write_tensors(partial / name, named, (about or {}).get(name, {}))
    for name, text in texts.items():
        (partial / name).write_text(text)
    listed = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(partial.iterdir())}
    flush(partial)
    (partial / MANIFEST_FILE).write_text(json.dumps(listed, indent=2))
    flush(partial)
    if final.exists():  # one that was passed over
        discard(final)
    partial.rename(final)
    flush_folder(folder)
    return final


def prune(
    folder: Path, *, last: int | None, every: int | None, newest: Path, damaged: Collection[Path] = ()
) -> list[Path]:
    """Delete all but the `last` newest checkpoints and those at multiples of `every` steps; what was deleted.

    newest: one that is known to be good, and stays. damaged: those that do not count, and go.
    """
    if last is None:
        return []
    sound = [c for c in checkpoints(folder) if c not in damaged and step_of(c) <= step_of(newest)]
    kept = {newest, *sound[:last], *(c for c in sound if every and step_of(c) % every == 0)}
    gone = [c for c in checkpoints(folder) if c not in kept]
    for checkpoint in gone:
        discard(checkpoint)
    return gone


def sweep(folder: Path) -> None:
    """Delete what a run that was killed left half-written or half-deleted."""
    for left in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.discarded")]:
        shutil.rmtree(left, ignore_errors=True)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint such that it is never seen half-deleted."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """The folder's files are on the disk, and so are their names."""
    for file in folder.iterdir():
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """The names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
