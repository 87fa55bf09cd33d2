"""O1's attention over a packed run, without ever building an S x S mask.

Two exact passes per sample replace the mask: the AR tokens attend causally among themselves, and the
GEN tokens (<|tms_token|> and patches) attend to everything in their sample. Both are plain cases of
PyTorch's scaled_dot_product_attention, which on a GPU runs cuDNN's or the flash kernel. Samples of the
same shape go through together as one dense batch; nothing is ever padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdl.o1.layout import Layout

# None of these materialises the score matrix. float32 on a GPU takes the memory-efficient kernel.
GPU_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """q [S, heads, d], k and v [S, kv_heads, d] -> [S, heads, d], scaled by 1/sqrt(d)."""
    if len(layout.groups) == 1:  # one shape only: the run already is the dense batch
        group = layout.groups[0]
        b = group.index.shape[0]
        dense_q, dense_k, dense_v = (x.view(b, -1, *x.shape[1:]) for x in (q, k, v))
        return attend_group(dense_q, dense_k, dense_v, group.text).reshape(q.shape)
    out = torch.empty_like(q)
    for group in layout.groups:
        attended = attend_group(q[group.index], k[group.index], v[group.index], group.text)
        out = out.index_put((group.index,), attended)
    return out


def attend_group(q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
    """[b, tokens, heads, d] of samples of one shape with L = `text` -> the same shape."""
    n_ar = text - 1
    ar = attend(q[:, :n_ar], k[:, :n_ar], v[:, :n_ar], causal=True)
    gen = attend(q[:, n_ar:], k, v, causal=False)
    return torch.cat([ar, gen], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [b, n, heads, d] to k and v [b, m, kv_heads, d] -> [b, n, heads, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, heads, n, d]
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
    if q.dtype == torch.float32:  # the memory-efficient kernel has no grouped queries
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(GPU_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
