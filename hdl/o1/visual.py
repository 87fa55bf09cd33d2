"""What the model sees of reference images: the visual tower of Qwen3-VL, frozen.

An image reaches the decoder twice. Its pixels are clean patches beside the picture's (hdl/o1/layout.py); and the
tower turns a smaller copy, about 384 x 384, into a grid of tokens that stand in the prompt. What some of the
tower's own layers saw is added to these tokens after the decoder's first layers ("deepstack").

The tower and its image processor are transformers' own; only what comes before and after is here.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hdl.errors import HdlError
from hdl.o1.checkpoint import Checkpoint
from hdl.o1.layout import Grid

PREFIX = "model.visual."
UNIT = 32  # pixels of one token's side: two patches of 16


@dataclass(frozen=True)
class View:
    """Images as the tower sees them, V tokens in all. grids: rows, cols of tokens of each; features [V, D]: what
    stands in the prompt; deepstack: [V, D] for each of the decoder's first layers."""

    grids: list[Grid]
    features: Tensor
    deepstack: list[Tensor]


class VisualTower:
    """A checkpoint's tower. HdlError where the checkpoint has none, or not all of it: ComfyUI's single file
    lacks the deepstack's weights."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoImageProcessor  # slow to import, and needed for references alone
        from transformers.models.qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel

        described = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        try:
            config = Qwen3VLVisionConfig(**described["vision_config"])
        except KeyError:
            raise HdlError(
                f"{checkpoint.folder / 'config.json'} has no vision_config; reference images need the published one"
            ) from None
        with init_empty_weights():  # buffers, which no checkpoint holds, are computed all the same
            model: Any = Qwen3VLVisionModel(config)
        names = [name for name, _ in model.named_parameters()]
        missing = [PREFIX + name for name in names if PREFIX + name not in checkpoint.entries]
        if missing:
            raise HdlError(
                f"{checkpoint.path} lacks {len(missing)} of the visual tower's tensors ({missing[0]}, …), which "
                "reference images need; use the published folder, which has them all"
            )
        stored = checkpoint.read_all([PREFIX + name for name in names], device, dtype)
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored}
        model.load_state_dict(weights, assign=True)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                # The model's own code keeps the rotary frequencies in its weights' bfloat16; so do its numbers.
                setattr(module, name, buffer.bfloat16().float())
        self.model = model.to(device).requires_grad_(False).eval()
        self.device, self.dtype = torch.device(device), dtype
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(checkpoint.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise HdlError(
                f"{checkpoint.folder}: no image processor ({error}); copy the published preprocessor_config.json there"
            ) from None

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> View:
        """images: the references as they were resized for their patches."""
        side = side_seen(len(images))
        small = [image.resize(size_seen(image, side), Image.Resampling.LANCZOS) for image in images]
        ready = self.processor(images=small, return_tensors="pt")
        pixels = ready["pixel_values"].to(self.device, self.dtype)
        grid = ready["image_grid_thw"].to(self.device)
        seen = self.model(pixels, grid_thw=grid)
        merge = self.model.spatial_merge_size
        grids = [(h // merge, w // merge) for _, h, w in ready["image_grid_thw"].tolist()]
        return View(grids, seen.pooler_output, list(seen.deepstack_features))


def side_seen(count: int) -> int:
    """Of the square whose area each of `count` images has when the tower sees it, in pixels."""
    return 384 if count <= 4 else 288 if count <= 8 else 192


def size_seen(image: Image.Image, side: int) -> tuple[int, int]:
    """Width and height near side² in area, the image's shape, whole units."""
    shape = image.width / image.height
    width, height = side * math.sqrt(shape), side / math.sqrt(shape)
    return max(UNIT, int(width / UNIT) * UNIT), max(UNIT, int(height / UNIT) * UNIT)
