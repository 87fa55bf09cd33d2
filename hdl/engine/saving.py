"""Saving a run while it goes on, and bringing a fresh engine back to where one was saved.

On the step's path there is only the copy into host memory (hdl/engine/full_state.py). A thread of rank 0 hashes
and writes; the next save waits for it, since both use the same memory. What goes wrong in the thread is told at the
next step (`problem`), on which all ranks then agree.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hdl.adapter.flat import in_flat
from hdl.adapter.lora import CONFIG_FILE, WEIGHTS_FILE, adapter_config, sizes_of, stored_names
from hdl.adapter.metadata import describe
from hdl.config import Save
from hdl.engine.checkpoints import (
    AVERAGE_FILE,
    OPTIMIZER_FILE,
    RUN_FILE,
    STATE_FILE,
    Damaged,
    flush,
    flush_folder,
    path_of,
    prune,
    step_of,
    write_checkpoint,
)
from hdl.engine.ema import Average
from hdl.engine.full_state import WEIGHT, FullState, places
from hdl.engine.moments import named_moments, write_moments
from hdl.engine.partitions import flat_partitions
from hdl.engine.processes import Processes
from hdl.engine.run_folder import Found, RunFolder
from hdl.errors import HdlError
from hdl.transfer import Mark

AVERAGE = "average"  # a kind of numbers, beside those of hdl/engine/full_state.py
AVERAGED = "averaged"  # in trainer_state.json, where there is an average: of how many updates


class Saver:
    """A run's checkpoints, as they are made. Every rank has one; rank 0's writes."""

    def __init__(
        self, engine: DeepSpeedEngine, processes: Processes, folder: RunFolder, settings: Save,
        trained_on: dict[str, str], found: Found, *, trigger: str | None = None, average: Average | None = None,
    ) -> None:  # fmt: skip
        """folder: claimed; found: what the run goes on from; trigger: data.trigger; average: of the adapter, saved with
        it."""
        self.trigger = trigger
        self.processes, self.folder, self.settings = processes, folder.checkpoints, settings
        self.trained_on, self.damaged, self.newest = trained_on, set(found.damaged), found.newest
        self.average = average
        beside = {AVERAGE: average.flats} if average else None
        self.state = FullState(engine, holds=processes.is_main, beside=beside)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._begun = step_of(found.newest) if found.newest else None  # the last step that was saved
        self._problem: HdlError | None = None
        if processes.is_main:
            self._stored, self._sizes = stored_names(engine.module), sizes_of(engine.module)
            self._texts = {RUN_FILE: folder.config.read_text(), CONFIG_FILE: adapter_config(engine.module)}

    def path(self, step: int) -> Path:
        return path_of(self.folder, step)

    def save(self, step: int, state: dict[str, Any], say: Callable[[str], None] | None) -> Mark | None:
        """Save what is there after `step` steps, with `state` in its trainer_state.json; the copy is done at the
        mark. Every rank calls this. say: rank 0's, told by the thread what became of it. None when this step has
        been saved before.

        HdlError on every rank when the save before could not be written.
        """
        if step == self._begun:
            return None
        self.finish()
        mark = self.state.refill()
        self._begun = step
        if self.processes.is_main:
            averaged = {AVERAGED: self.average.updates} if self.average else {}
            described = {"step": step, **state, **averaged, **self.trained_on}
            self._writing = self._thread.submit(self._write, mark, step, described, say)
        return mark

    def problem(self) -> HdlError | None:
        """What went wrong with a save that has ended meanwhile; on rank 0."""
        if self._writing and self._writing.done():
            self.join()
        return self._problem

    def finish(self) -> None:
        """Return when all is written; HdlError on every rank when it could not be. Every rank calls this."""
        self.join()
        self.processes.all_or_none(self._problem)

    def join(self) -> None:
        """Wait for the thread, whatever comes of it."""
        writing, self._writing = self._writing, None
        if writing:
            try:
                self.newest = writing.result()
            except OSError as error:
                self._problem = HdlError(
                    f"a checkpoint could not be written to {self.folder} ({error}); earlier ones are intact"
                )

    def close(self) -> None:
        self.join()
        self._thread.shutdown()

    def install_adapter(
        self, folder: Path, weights: str = WEIGHTS_FILE, texts: Mapping[str, str] | None = None
    ) -> None:
        """Copy the newest checkpoint's adapter to `folder`, in one piece; rank 0's to call after `finish`. weights:
        the file that holds it there; texts: files to lie beside it."""
        assert self.newest, "a run that has ended has been saved"
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name, installed in ((weights, WEIGHTS_FILE), (CONFIG_FILE, CONFIG_FILE)):
                shutil.copyfile(self.newest / name, partial / installed)
            for name, text in (texts or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
            flush(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            flush_folder(folder.parent)
        except OSError as error:
            raise HdlError(
                f"{folder} could not be written ({error}); the adapter is also in {self.newest}"
            ) from None

    def _about(self, step: int) -> dict[str, str]:
        """What the adapter's file says of itself; nothing that differs between runs of the same config."""
        metadata = describe(
            title=self.trigger or "LoRA", base=self.trained_on["base"], dataset=self.trained_on["data"], steps=step,
            trigger=self.trigger, license=self.settings.license,
        )  # fmt: skip
        return metadata | self._sizes

    def _write(
        self, mark: Mark, step: int, described: dict[str, Any], say: Callable[[str], None] | None
    ) -> Path:
        mark.wait()
        adapters = {WEIGHTS_FILE: self.state.named(WEIGHT)}
        if self.average:
            adapters[AVERAGE_FILE] = self.state.named(AVERAGE)
        in_files = {
            file: {stored: weights[name] for name, stored in self._stored.items()}
            for file, weights in adapters.items()
        }
        path = write_checkpoint(
            self.folder,
            step,
            texts=self._texts | {STATE_FILE: json.dumps(described, indent=2)},
            tensors=in_files | {OPTIMIZER_FILE: named_moments(self.state)},
            about=dict.fromkeys(in_files, self._about(step)),
        )
        self.damaged.discard(path)  # it has been replaced
        gone = prune(
            self.folder,
            last=self.settings.keep_last,
            every=self.settings.keep_every,
            newest=path,
            damaged=self.damaged,
        )
        removed = f"; removed {', '.join(c.name for c in gone)}" if gone else ""
        if say:
            say(f"saved {path}{removed}")
        return path


@torch.no_grad()
def restore(
    engine: DeepSpeedEngine, checkpoint: Path, adapter: dict[str, Tensor], step: int, updates: int
) -> None:
    """Bring a fresh engine, whose module already holds the checkpoint's adapter, to where it was saved.

    The module holds the adapter in the training dtype; masters and moments are restored in their own. adapter: the
    checkpoint's, as read_adapter has it. updates: how many of the steps the optimizer took.
    """
    weights = in_flat(engine.module, adapter)
    rank = dist.get_rank(engine.optimizer.dp_process_group)
    for name, place in places(engine).items():
        place.put(weights[name], flat_partitions(engine), rank)
    try:
        write_moments(engine, load_file(checkpoint / OPTIMIZER_FILE), updates)
    except (OSError, SafetensorError, KeyError) as error:
        raise Damaged(f"{checkpoint}: {OPTIMIZER_FILE} is not readable ({error!r})") from None
    engine.global_steps = step
    engine.lr_scheduler.last_epoch = step - 1
    engine.lr_scheduler.step()  # the schedule is a function of the step
