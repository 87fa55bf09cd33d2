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
from pathlib import Path
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


@dataclass(frozen=True)
class Look:
    """Images ready for the tower. pixels: float32 [n, C], the tower's own patches of all images; grid:
    int64 [K, 3], on the CPU, how many frames, rows and columns of them each image has."""

    pixels: Tensor
    grid: Tensor

    @classmethod
    def joined(cls, looks: Sequence["Look"]) -> "Look":
        return cls(torch.cat([look.pixels for look in looks]), torch.cat([look.grid for look in looks]))

    def pinned(self) -> "Look":
        return Look(self.pixels.pin_memory(), self.grid)

    def to(self, device: torch.device | str) -> "Look":
        """Its pixels there; the grid is read here, without waiting for a GPU."""
        return Look(self.pixels.to(device, non_blocking=True), self.grid)


class Eyes:
    """What brings images before a checkpoint's tower; needs none of its weights. HdlError where the checkpoint's
    folder describes no tower or no image processor."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor  # slow to import, and needed for references alone

        self.merge: int = vision_config(folder).get("spatial_merge_size", 2)
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise HdlError(
                f"{folder}: no image processor ({error}); copy the published preprocessor_config.json there"
            ) from None
        self._grids: dict[tuple[int, int], Grid] = {}

    def look(self, images: Sequence[Image.Image]) -> Look:
        """images: the references of one picture, as they were resized for their patches."""
        side = side_seen(len(images))
        small = [image.resize(size_seen(image.size, side), Image.Resampling.LANCZOS) for image in images]
        return self._prepared(small)

    def grids(self, look: Look) -> list[Grid]:
        """Rows and columns of the tokens that the tower makes of each image."""
        return [(rows // self.merge, cols // self.merge) for _, rows, cols in look.grid.tolist()]

    def grids_of(self, sizes: Sequence[tuple[int, int]]) -> list[Grid]:
        """The same for images of these widths and heights in px, which need not be there."""
        side, grids = side_seen(len(sizes)), []
        for size in sizes:
            seen = size_seen(size, side)
            if seen not in self._grids:
                [self._grids[seen]] = self.grids(self._prepared([Image.new("RGB", seen)]))
            grids.append(self._grids[seen])
        return grids

    def identity(self) -> str:
        """Tells processors apart that may make other grids."""
        known = self.processor.to_dict()
        said = {name: known.get(name) for name in ("size", "patch_size", "merge_size")}
        return json.dumps([self.merge, said], sort_keys=True, default=str)

    def _prepared(self, images: list[Image.Image]) -> Look:
        ready = self.processor(images=images, return_tensors="pt")
        return Look(ready["pixel_values"], ready["image_grid_thw"])


class VisualTower:
    """A checkpoint's tower. HdlError where the checkpoint has none, or not all of it: ComfyUI's single file
    lacks the deepstack's weights."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> None:
        model = bare_tower(checkpoint)
        names = [name for name, _ in model.named_parameters()]
        stored = checkpoint.read_all([PREFIX + name for name in names], device, dtype)
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored}
        model.load_state_dict(weights, assign=True)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                # The model's own code keeps the rotary frequencies in its weights' bfloat16; so do its numbers.
                setattr(module, name, buffer.bfloat16().float())
        self.model = model.to(device).requires_grad_(False).eval()
        self.device, self.dtype = torch.device(device), dtype
        self.eyes = Eyes(checkpoint.folder)

    def see(self, images: Sequence[Image.Image]) -> View:
        """images: the references as they were resized for their patches."""
        return self.view(self.eyes.look(images))

    @torch.no_grad()
    def view(self, look: Look) -> View:
        pixels, grid = look.pixels.to(self.device, self.dtype), look.grid.to(self.device)
        seen = self.model(pixels, grid_thw=grid)
        return View(self.eyes.grids(look), seen.pooler_output, list(seen.deepstack_features))


def vision_config(folder: Path) -> dict[str, Any]:
    """HdlError where config.json has none."""
    path = folder / "config.json"
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "vision_config" not in described:
        raise HdlError(f"{path} has no vision_config; reference images need the published one")
    config: dict[str, Any] = described["vision_config"]
    return config


def bare_tower(checkpoint: Checkpoint) -> Any:
    """The tower without its weights. HdlError where the checkpoint lacks some of them."""
    from accelerate import init_empty_weights
    from transformers.models.qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(**vision_config(checkpoint.folder))
    with init_empty_weights():  # buffers, which no checkpoint holds, are computed all the same
        model: Any = Qwen3VLVisionModel(config)
    names = [PREFIX + name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in checkpoint.entries]
    if missing:
        raise HdlError(
            f"{checkpoint.path} lacks {len(missing)} of the visual tower's tensors ({missing[0]}, …), which "
            "reference images need; use the published folder, which has them all"
        )
    return model


def tower_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What its weights take on a GPU. HdlError as VisualTower's, before anything is read."""
    Eyes(checkpoint.folder)
    return sum(parameter.numel() for parameter in bare_tower(checkpoint).parameters()) * dtype.itemsize


def side_seen(count: int) -> int:
    """Of the square whose area each of `count` images has when the tower sees it, in pixels."""
    return 384 if count <= 4 else 288 if count <= 8 else 192


def size_seen(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height near side² in area, in the shape of an image of this width and height, whole units."""
    shape = size[0] / size[1]
    width, height = side * math.sqrt(shape), side / math.sqrt(shape)
    return max(UNIT, int(width / UNIT) * UNIT), max(UNIT, int(height / UNIT) * UNIT)
