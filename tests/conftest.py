"""What every room's tests share: the tiny golden checkpoint and ways to spoil a copy of it."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """A random checkpoint of O1's structure, 0.7 M parameters."""
    return GOLDEN / "o1-tiny"
