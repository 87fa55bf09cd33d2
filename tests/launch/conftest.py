"""What the launch scripts train: the tiny base on a few photographs, as a run's TOML file, and how that ends when
nothing comes between."""

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.conftest import REPOSITORY, Finished, photos, shards  # noqa: F401  # fixtures

STEPS = 24
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": os.environ["PYTHONPATH"],
    "RESTARTS": "0",
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """A run that is not started yet."""

    config: Path
    output: Path

    @property
    def adapter(self) -> dict[str, Tensor]:
        return load_file(self.output / "adapter" / "adapter_model.safetensors")

    def saved(self) -> list[str]:
        """Names of its checkpoints."""
        return sorted(path.name for path in (self.output / "checkpoints").glob("step-*"))

    def losses(self) -> dict[int, float]:
        return Finished(0, "", self.output).curve("loss")


Describe = Callable[..., Described]


@pytest.fixture(scope="session")
def describe(
    shards: Path,  # noqa: F811
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Describe:
    def write(name: str, **train: object) -> Described:
        folder = tmp_path_factory.mktemp(name)
        run = {
            "model": {"base": str(tiny_base)},
            "data": {"shards": str(shards)},
            "lora": {"rank": 4},
            "train": {
                "steps": STEPS,
                "batch_size": 4,
                "lr": 1e-2,
                "warmup_steps": 2,
                "seed": 3,
                "patience": 120.0,
                **train,
            },
            "save": {"output": str(folder / "run"), "every": 4},
        }
        (folder / "run.toml").write_text(tomli_w.dumps(run))
        return Described(folder / "run.toml", folder / "run")

    return write


def node(run: Described, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/node.sh with a run, to its end."""
    return subprocess.run(
        [REPOSITORY / "launch" / "node.sh", run.config, *flags],
        cwd=REPOSITORY, env=clean(os.environ) | ENVIRONMENT | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what describes a process group or a job of others."""
    ours = ("SLURM", "SBATCH", "TORCHELASTIC")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {n: v for n, v in environment.items() if not n.startswith(ours) and n not in names}


@pytest.fixture(scope="session")
def alone(describe: Describe) -> Described:
    """STEPS steps on one process."""
    return _trained(describe("alone"), "1")


@pytest.fixture(scope="session")
def undisturbed(describe: Describe) -> Described:
    """The same on two processes of one node."""
    return _trained(describe("undisturbed"), "2")


def _trained(run: Described, processes: str) -> Described:
    done = node(run, PROCESSES=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.saved()[-1] == f"step-{STEPS:06d}"
    return run
