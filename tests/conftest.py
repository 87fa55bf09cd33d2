"""What every room's tests share: the tiny golden checkpoint and ways to spoil a copy of it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from hdl.engine.processes import Processes

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

GOLDEN = Path(__file__).parent / "golden"
# For what tests start; what else is on the path stays there.
_PATH = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATH))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """A random checkpoint of O1's structure, 0.7 M parameters."""
    return GOLDEN / "o1-tiny"


@pytest.fixture(scope="session")
def joined() -> Iterator[tuple["Processes", dict[str, str]]]:
    """The one process group of this pytest process, and the environment that describes it: DeepSpeed remembers
    the first group it meets and fails with any later one."""
    from hdl.engine.processes import process_group  # DeepSpeed takes seconds to import

    before = dict(os.environ)
    with process_group() as processes:
        described = {name: value for name, value in os.environ.items() if before.get(name) != value}
        for name in described:
            del os.environ[
                name
            ]  # a run that another test starts must not take itself for a part of this group
        os.environ.update({name: before[name] for name in described if name in before})
        yield processes, described


@pytest.fixture
def group(joined: "tuple[Processes, dict[str, str]]", monkeypatch: pytest.MonkeyPatch) -> "Processes":
    """A world of one, to build engines of DeepSpeed's in."""
    processes, described = joined
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    return processes
