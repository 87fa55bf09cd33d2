"""The stock arm: what public trainers of this model do today, from public libraries alone.

The decoder is `transformers`' own Qwen3VLTextModel, the adapter PEFT's; every decoder layer is
checkpointed. Attention takes two passes on PyTorch's flash kernel (causal over the text, dense over all
for the rest), which spares it the dense mask that the model's published code builds. Around the decoder
stand O1's small ends, plain linears, the same modules as in `hdl.o1.decoder`. Weights, adapter and
optimizer state are in the frozen weights' dtype: PEFT would keep the adapter in float32 and cast
every activation for it, which is slower, so the comparison is with the faster choice.

Images of one size go through as a batch. Images of several sizes go one by one with their gradients added
up, which is what such trainers do with them: their batches hold one size only.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLTextRotaryEmbedding

from hdl.config import Lora
from hdl.data.batches import Batch
from hdl.memory.recompute import recompute_every_layer
from hdl.o1.checkpoint import Checkpoint
from hdl.o1.decoder import O1
from hdl.o1.layout import Layout
from hdl.seeds import derive_seed, seeded

NOISE_SCALE = 8.0  # of the full variant
TWO_PASS = "hdl_two_pass"  # a name with "flash" in it would send transformers looking for a library


class StockDecoder(Qwen3VLTextModel):
    """Called as `hdl.o1.decoder.Decoder` is; parameters have the same names."""

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """x [S, D] of samples of one shape -> [S, D]."""
        batch = len(layout.segments)
        if len(layout.groups) != 1:
            raise ValueError(f"{batch} samples of {len(layout.groups)} shapes, expected one shape")
        positions = layout.positions.unflatten(1, (batch, -1))  # [3, B, S/B]
        out = super().forward(
            inputs_embeds=x.unflatten(0, (batch, -1)), position_ids=positions, text=layout.groups[0].text
        )
        return out.last_hidden_state.flatten(0, 1)


def stock_model(
    checkpoint: Checkpoint, config_file: Path, lora: Lora, seed: int, device: torch.device, dtype: torch.dtype,
    *, recompute: bool = True,
) -> PeftModel:  # fmt: skip
    """O1 with the stock decoder and a fresh adapter; called as `hdl.o1.decoder.O1` is, with samples of one
    shape. config_file: the checkpoint's config.json. recompute: checkpoint every layer, for training."""
    AttentionInterface.register(TWO_PASS, two_pass_attention)
    text_config = json.loads(config_file.read_text(encoding="utf-8"))["text_config"]
    config = Qwen3VLTextConfig(**text_config | {"use_cache": False})
    config._attn_implementation = TWO_PASS
    with torch.device("meta"):
        model = O1(checkpoint.config)
        decoder = StockDecoder(config)
    decoder.embed_tokens = None  # type: ignore[assignment]  # text arrives as embeddings
    decoder.rotary_emb = Qwen3VLTextRotaryEmbedding(config).to(device)  # its buffers are in no checkpoint
    model.model.language_model = decoder  # type: ignore[assignment]
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(dict(checkpoint.read_all(names, device, dtype)), assign=True)
    model.requires_grad_(False)
    if recompute:
        recompute_every_layer(model)
    adapter = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets)  # type: ignore[arg-type]
    with seeded(derive_seed(seed, "lora")):
        return get_peft_model(model, adapter, autocast_adapter_dtype=False)  # type: ignore[arg-type]


def stock_loss(model: Callable[..., Tensor], batch: Batch, sigma: Tensor, eps: Tensor) -> Tensor:
    """This batch's part of the step's x0 loss, in plain PyTorch.

    batch: on the device, samples of one shape; sigma: float32 [B]; eps: float32 [P, 3072], standard normal.
    """
    x0 = batch.patches.float() / 127.5 - 1.0
    of_patch = sigma.repeat_interleave(len(x0) // len(sigma))[:, None]
    z = (1.0 - of_patch) * x0 + of_patch * NOISE_SCALE * eps
    x_pred = model(batch.text, z, 1.0 - sigma, batch.layout)
    return F.mse_loss(x_pred.float(), x0) * (len(x0) / batch.global_patches)


def two_pass_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, text: int, **_: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, heads, S, d], key and value [B, kv_heads, S, d] -> [B, S, heads, d].

    text: L; the first L - 1 tokens are causal among themselves, the others see everything.
    """
    n_ar = text - 1
    ar = _flash(query[:, :, :n_ar], key[:, :, :n_ar], value[:, :, :n_ar], causal=True)
    gen = _flash(query[:, :, n_ar:], key, value, causal=False)
    return torch.cat([ar, gen], dim=2).transpose(1, 2), None


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
