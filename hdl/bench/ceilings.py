"""What the machine could do at best: GEMM and attention throughput at a case's sizes, measured alone.

GEMM: the four linears of a fused decoder layer, each forward [rows, in] x [in, out] and for the gradient
of its input [rows, out] x [out, in], one after another as in training; TFLOP/s is all their work over all
their time. In fp8 (e4m3, one scale a row and one a column, `torch._scaled_mm`) quantization is not part of
it. Attention: dense, forward and backward, over the case's sequences, through the fastest kernel PyTorch
offers.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from hdl.bench.cases import gemm_shapes
from hdl.kernels.quantize import E4M3_MAX
from hdl.o1.attention import GPU_BACKENDS
from hdl.o1.config import O1Config

SECONDS = 0.4  # each ceiling is measured at least so long on a GPU, long enough for its clock to settle


def gemm_ceiling(config: O1Config, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s in `dtype` (bfloat16, float32)."""
    shapes = gemm_shapes(config)
    calls: list[Callable[[], Tensor]] = []
    for inputs, outputs in shapes:
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * 0.02
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        grad = torch.randn(rows, outputs, device=device, dtype=dtype)
        calls += [lambda x=x, w=weight: x @ w.t(), lambda g=grad, w=weight: g @ w]  # type: ignore[misc]
    return _rate(calls, 4.0 * rows * sum(i * o for i, o in shapes), device)


def fp8_gemm_ceiling(config: O1Config, rows: int, device: torch.device) -> float:
    """TFLOP/s of row-wise scaled e4m3 with bfloat16 output."""
    shapes = gemm_shapes(config)
    calls: list[Callable[[], Tensor]] = []
    for inputs, outputs in shapes:
        for inner, outer in ((inputs, outputs), (outputs, inputs)):
            a, scale_a = _quantized(torch.randn(rows, inner, device=device))
            b, scale_b = _quantized(torch.randn(outer, inner, device=device))
            calls.append(
                lambda a=a, b=b, s=scale_a, t=scale_b: torch._scaled_mm(  # type: ignore[misc]
                    a, b.t(), s, t.t(), out_dtype=torch.bfloat16, use_fast_accum=True
                )
            )
    return _rate(calls, 4.0 * rows * sum(i * o for i, o in shapes), device)


def attention_ceiling(
    config: O1Config, batch: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """TFLOP/s of forward and backward over `batch` sequences of `tokens`."""
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (
        torch.randn(batch, tokens, n, d, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    out_grad = torch.randn(batch, tokens, heads, d, device=device, dtype=dtype).transpose(1, 2)

    def forward_and_backward() -> Tensor:
        if device.type == "cuda":
            with sdpa_kernel(GPU_BACKENDS, set_priority=True):
                out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), out_grad)[0]

    return _rate([forward_and_backward], 3.5 * 4.0 * batch * tokens**2 * heads * d, device)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [rows, n] and its float32 scales [rows, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def _rate(calls: list[Callable[[], Tensor]], flops: float, device: torch.device) -> float:
    """TFLOP/s of `calls` in turn, repeated; `flops` is the work of one round."""

    def seconds(rounds: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        _synchronize(device)
        return time.perf_counter() - start

    seconds(3)
    rounds = max(1, int(SECONDS / seconds(1))) if device.type == "cuda" else 1
    return flops * rounds / seconds(rounds) / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
