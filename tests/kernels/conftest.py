"""Kernels run on the GPU if there is one, in Triton's interpreter otherwise; and as plain formulas."""

import pytest
import torch

from hdl.kernels import adapter_copies, folded, head_norm_rotary, quantize, rms_norm, swiglu
from tests.kernels.helpers import round_like_hardware

if not torch.cuda.is_available():
    round_like_hardware()


@pytest.fixture(params=["kernel", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways an operation can go on this device."""
    if request.param == "plain":
        for module in (adapter_copies, folded, head_norm_rotary, quantize, rms_norm, swiglu):
            monkeypatch.setattr(module, "runs_triton", lambda tensor: False)
    return str(request.param)
