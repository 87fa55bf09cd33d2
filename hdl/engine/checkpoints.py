"""Checkpoints of a run: the adapter, the optimizer's moments and the step.

A checkpoint is a folder `step-000500` of safetensors and JSON; nothing is pickled. It holds full tensors,
so it does not depend on the number of ranks, the ZeRO stage or the optimizer: resumed with a bfloat16 master,
float32 weights are rounded once, and 8-bit moments likewise. Random state, data position and schedule
need no storing: all are functions of the step (hdl/seeds.py, hdl/data/batches.py). A folder is written
under a temporary name and renamed when it is complete.

    adapter_model.safetensors, adapter_config.json   the PEFT adapter: its master weights, in float32
    optimizer.safetensors                            exp_avg and exp_avg_sq of every parameter, float32
    trainer_state.json                               step, and what the run was trained on
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdl.adapter.flat import by_name, in_flat, trained_parameters
from hdl.adapter.lora import read_adapter, save_adapter
from hdl.engine.moments import read_moments, write_moments
from hdl.engine.processes import Processes
from hdl.errors import HdlError

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a run's checkpoints folder."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json; HdlError when the checkpoint is not complete."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
        state["step"] = int(state["step"])
        return state
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise _incomplete(checkpoint, error) from None


def adapter_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The adapter's full master weights, float32 on the CPU; every rank must call this."""
    parameters = trained_parameters(engine.module)
    weights = {name: safe_get_full_fp32_param(p).float().cpu() for name, p in parameters.items()}
    return by_name(engine.module, weights)


def save_checkpoint(
    engine: DeepSpeedEngine, folder: Path, step: int, trained_on: dict[str, str], processes: Processes
) -> Path:
    """Write the state after `step` steps to folder/step-NNNNNN. Every rank calls this, rank 0 writes.

    HdlError on every rank when it cannot be written; earlier checkpoints are not touched.
    """
    weights = adapter_weights(engine)
    moments = read_moments(engine)
    final = folder / f"step-{step:06d}"
    problem = None
    if processes.is_main:
        partial = folder / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(engine.module, weights, partial)
            save_file(moments, partial / OPTIMIZER_FILE)
            (partial / STATE_FILE).write_text(json.dumps({"step": step, **trained_on}, indent=2))
            _flush(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            problem = HdlError(f"{final}: could not be written ({error}); earlier checkpoints are intact")
    processes.all_or_none(problem)
    return final


def restore(engine: DeepSpeedEngine, checkpoint: Path, step: int) -> None:
    """Bring a fresh engine, whose module already holds the checkpoint's adapter, to where it was saved.

    The module holds the adapter in the training dtype; masters and moments are restored in their own.
    """
    weights = in_flat(engine.module, read_adapter(engine.module, checkpoint))
    for name, parameter in trained_parameters(engine.module).items():
        safe_set_full_fp32_param(parameter, weights[name].float().to(engine.device))
    try:
        write_moments(engine, load_file(checkpoint / OPTIMIZER_FILE), step)
    except (OSError, SafetensorError, KeyError) as error:
        raise _incomplete(checkpoint, error) from None
    engine.global_steps = step
    engine.lr_scheduler.last_epoch = step - 1
    engine.lr_scheduler.step()  # the schedule is a function of the step


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb+") as written:
            os.fsync(written.fileno())


def _incomplete(checkpoint: Path, error: Exception) -> HdlError:
    return HdlError(
        f"{checkpoint}: not a complete checkpoint ({type(error).__name__}: {error}); remove it to resume from an "
        "earlier one"
    )
