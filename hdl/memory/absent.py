"""Frozen weights that stay in their file until somebody needs them.

A linear whose weight was left out has a stand-in: a tensor of the right shape, dtype and device whose elements
share one number, so that it takes no memory. PEFT looks at these three and is content. It is no parameter,
so an engine that converts, moves or broadcasts the model's parameters leaves it alone. Who packs the weights
(hdl/kernels/fuse.py) reads them one by one with `weight_of`, and no two are in memory in their old form.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def leave_out(
    linear: nn.Linear, read: Callable[[], Tensor], device: torch.device | str, dtype: torch.dtype
) -> None:
    """Make the weight absent; read: brings it, on `device` in `dtype`, whenever asked."""
    shape = linear.weight.shape
    del linear.weight
    linear.weight = stand_in(shape, device, dtype)  # type: ignore[assignment]
    linear.read_weight = read  # type: ignore[assignment]


def weight_of(linear: nn.Linear) -> Tensor:
    """The weight [out, in] itself: what stands there, or what is read now."""
    read: Callable[[], Tensor] | None = getattr(linear, "read_weight", None)
    return read() if read else linear.weight.detach()


def put_in_place(linear: nn.Linear, weight: Tensor) -> None:
    """Let `weight` stand where the linear's weight, there or absent, stood."""
    if "weight" in linear._parameters:
        linear.weight.data = weight
        return
    linear.weight = weight  # type: ignore[assignment]
    linear.__dict__.pop("read_weight", None)


def take_out(linear: nn.Linear) -> None:
    """Let go of a weight that is kept in another form; its stand-in remains."""
    put_in_place(linear, stand_in(linear.weight.shape, linear.weight.device, linear.weight.dtype))


def bring_in(model: nn.Module) -> None:
    """Read every absent weight; they are parameters again, and frozen."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "read_weight"):
            weight = weight_of(module)
            del module.weight, module.read_weight
            module.weight = nn.Parameter(weight, requires_grad=False)


def stand_in(shape: torch.Size, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), device=device, dtype=dtype).expand(shape)
