"""What the command lines of the benchmarks have in common."""

import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from hdl.errors import HdlError
from hdl.o1.checkpoint import RandomCheckpoint


def check_counts(args: Namespace, fewest_steps: int) -> None:
    """HdlError for --steps, --warmup and --rank that cannot work."""
    if args.steps < fewest_steps:
        raise HdlError(f"--steps {args.steps}: at least {fewest_steps} are needed for a median")
    for name in ("warmup", "rank"):
        if getattr(args, name) < 1:
            raise HdlError(f"--{name} {getattr(args, name)}: expected at least 1")


def check_gpu(tiny: bool, profile: bool = False) -> None:
    """HdlError for what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    if not tiny:
        raise HdlError(
            "no CUDA GPU here, and the 8B model needs one; --tiny measures a tiny model on the CPU"
        )
    if profile:
        raise HdlError("--profile: shows where a GPU's time goes, and there is no CUDA GPU here")


def check_json(file: Path | None) -> None:
    """HdlError for a file that could not be written in the end."""
    if file and not file.resolve().parent.is_dir():
        raise HdlError(f"--json {file}: no folder {file.parent}")


def random_checkpoint(config: Path) -> RandomCheckpoint:
    """Random weights of the shapes that this config.json describes."""
    with tempfile.TemporaryDirectory() as folder:  # a checkpoint's folder holds a config.json
        shutil.copy(config, Path(folder) / "config.json")
        return RandomCheckpoint(Path(folder))


def machine(device: torch.device) -> dict[str, Any]:
    """What figures are to be read with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}
