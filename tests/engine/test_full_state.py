"""How a run's state comes into host memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hdl.engine import full_state
from hdl.engine.full_state import FullState

WORLD, LENGTH = 3, 10


class Copies(TorchDispatchMode):
    """Whether each copy was from one run of bytes to another."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.plain.append(args[0].is_contiguous() and args[1].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_a_copy_into_host_memory_is_one_run_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch takes any other by way of memory that is not page-locked, and waits for it: 0.7 s of a real adapter's."""
    partitions = torch.arange(WORLD * LENGTH, dtype=torch.float32).view(WORLD, LENGTH)
    begun = 0

    def gather(everyone: Tensor, mine: Tensor, group: object) -> None:
        nonlocal begun
        everyone.copy_(partitions[:, begun : begun + len(mine)].flatten())
        begun += len(mine)

    monkeypatch.setattr(full_state.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(full_state, "PIECE", 4 * WORLD)
    state = FullState.__new__(FullState)
    state.world = WORLD
    state.engine = SimpleNamespace(  # type: ignore[assignment]
        device=torch.device("cpu"), optimizer=SimpleNamespace(dp_process_group=None)
    )
    held = torch.zeros(WORLD, LENGTH)
    with Copies() as copies:
        state._copy(partitions[1], held)
    assert torch.equal(held, partitions)
    assert len(copies.plain) >= WORLD * 3 and all(copies.plain)
