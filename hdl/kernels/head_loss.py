"""The model's last linear and the x0 loss in one: e_p = mean_c (W h_p + b - x0_p)_c^2, x0 = pixels / 127.5 - 1.

hidden h [P, D], frozen W [3072, D] and b [3072] in the model's dtype, pixels uint8 [P, 3072]; e float32 [P].

The prediction is never kept. A patch's error depends on its own row of h alone, so its gradient,
de_p/dh_p = 2/3072 (W h_p + b - x0_p) W, is known up to one factor, the gradient that e_p will receive.
Forward computes it at once, in chunks of patches whose prediction is scratch, and keeps (x_pred - x0) W
[P, D] in h's dtype; backward multiplies its rows. One kernel turns the scratch x_pred into the errors and,
in place, into x_pred - x0, which is all that a pass over memory there is besides the two GEMMs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.kernels.backend import runs_triton
from hdl.o1.patches import PATCH_DIM, to_model

CHUNK = 4096  # patches: 24 MiB of scratch in bfloat16


def head_errors(hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, chunk: int = CHUNK) -> Tensor:
    """float32 [P]: each patch's mean squared error of hidden @ weight.T + bias against the clean pixels.

    hidden [P, D] of any strides, weight [3072, D] and bias [3072] of one dtype; pixels uint8 [P, 3072].
    Differentiable in hidden, once. ValueError when weight or bias ask for a gradient.
    """
    if weight.requires_grad or bias.requires_grad:
        raise ValueError("head_errors is for a frozen head: its weight or bias requires a gradient")
    return _HeadErrors.apply(hidden, weight, bias, pixels, chunk)


class _HeadErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, chunk: int) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        patches = len(hidden)
        errors = torch.empty(patches, dtype=torch.float32, device=hidden.device)
        scratch = hidden.new_empty(min(chunk, patches), PATCH_DIM)
        direction = hidden.new_empty(hidden.shape) if wants_gradient else None
        for start in range(0, patches, chunk):
            rows = slice(start, min(start + chunk, patches))
            x_pred = torch.addmm(bias, hidden[rows], weight.t(), out=scratch[: rows.stop - rows.start])
            errors[rows] = errors_in_place(x_pred, pixels[rows], wants_gradient)
            if direction is not None:
                torch.mm(x_pred, weight, out=direction[rows])
        ctx.save_for_backward(direction)
        return errors

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (direction,) = ctx.saved_tensors
        factor = (grad * (2 / PATCH_DIM))[:, None]
        # float32 times the model's dtype, rounded once on the way out
        return torch.mul(direction, factor, out=torch.empty_like(direction)), None, None, None, None


def errors_in_place(x_pred: Tensor, pixels: Tensor, leave_difference: bool) -> Tensor:
    """float32 [P]: mean squared error of each row of x_pred [P, 3072] (contiguous) against pixels, uint8
    [P, 3072]; with `leave_difference` x_pred becomes x_pred - x0, in its own dtype."""
    if runs_triton(x_pred):
        return _errors_in_place_fused(x_pred, pixels, leave_difference)
    difference = x_pred.float() - to_model(pixels)
    if leave_difference:
        x_pred.copy_(difference)
    return difference.square().mean(dim=-1)


def _errors_in_place_fused(x_pred: Tensor, pixels: Tensor, leave_difference: bool) -> Tensor:
    if pixels.stride(1) != 1:
        pixels = pixels.contiguous()
    errors = torch.empty(len(x_pred), dtype=torch.float32, device=x_pred.device)
    if len(x_pred):
        _errors[(len(x_pred),)](
            x_pred, pixels, errors, pixels.stride(0), PATCH_DIM, 1024, leave_difference, num_warps=4
        )
    return errors


@triton.jit
def _errors(
    x_pred_ptr: tl.tensor,
    pixels_ptr: tl.tensor,
    errors_ptr: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAVE_DIFFERENCE: tl.constexpr,
) -> None:
    """A program takes one patch."""
    patch = tl.program_id(0).to(tl.int64)
    x_pred, pixels = x_pred_ptr + patch * WIDTH, pixels_ptr + patch * stride
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x0 = (tl.load(pixels + at).to(tl.float32) - 127.5) * (1 / 127.5)
        difference = tl.load(x_pred + at).to(tl.float32) - x0
        squares += difference * difference
        if LEAVE_DIFFERENCE:
            tl.store(x_pred + at, difference.to(x_pred_ptr.dtype.element_ty))
    tl.store(errors_ptr + patch, tl.sum(squares, axis=0) / WIDTH)
