"""Tiny image encoders with random weights, in folders as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 30, "width": 30},
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7
}  # fmt: skip


def save_encoder(folder: Path, kind: str = "dinov2") -> Path:
    torch.manual_seed(0)
    model: Any
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2))
    else:
        model = DINOv3ViTModel(DINOv3ViTConfig(**SHAPE, intermediate_size=32, num_register_tokens=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder
