"""Where the fused kernels run, and how a profile knows them."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor take their Triton kernel instead of the plain formula.

    They do on a GPU, and anywhere in Triton's interpreter, which the tests use.
    """
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in fp8: Ada (sm_89) and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def named(family: str) -> AbstractContextManager[object]:
    """What runs inside counts as `family` in a profile (hdl.bench.profile); free while none is taken."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"hdl::{family}")
    return nullcontext()
