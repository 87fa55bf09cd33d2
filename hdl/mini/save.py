"""A small O1 in the form of the published checkpoint: one bfloat16 safetensors file, config, tokenizer.

The visual tower and the language model's head are left out, as in what a trainer reads of the real one; the config
still describes a small tower, because a Qwen3VLConfig has one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from hdl.mini.tokenizer import SPECIAL_TOKENS, VOCABULARY, write_tokenizer
from hdl.o1.checkpoint import TOKEN_TABLE


def mini_config(hidden: int = 320, layers: int = 6, heads: int = 10, mlp: int = 416) -> dict[str, Any]:
    """config.json of a small O1: heads of 32, two queries a key. The defaults make 5.85 M parameters, 11.7 MB.

    The rotary base is 10000 and not 5 million: heads of 32 have few frequencies, and a picture of 4x4 patches
    needs several that differ from one patch to the next.
    """
    special = {token: VOCABULARY - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads // 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 10000.0,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "intermediate_size": 128,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def save_checkpoint(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], table: Tensor, tokenizer: Tokenizer
) -> None:
    """Writes a checkpoint into an existing folder. weights: named as in the checkpoint; table: [vocabulary, D]."""
    tensors = {TOKEN_TABLE: table, **weights}
    stored = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    half_written = folder / "model.safetensors.part"
    save_file(stored, half_written, metadata={"format": "pt"})
    half_written.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder)
