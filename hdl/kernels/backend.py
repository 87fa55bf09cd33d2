"""Where the fused kernels run: on a GPU, or anywhere in Triton's interpreter, which the tests use."""

import os

from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor take their Triton kernel instead of the plain formula."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
