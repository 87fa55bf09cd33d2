"""An optional part of the loss: how far the predicted picture is from the clean one to a frozen image encoder.

Each sample's predicted patches are put together as a picture, squeezed into the encoder's square, and normalised as its
processor does. Both pictures' patch features f [n, D] are compared patch by patch:

    d = mean_i (1 - cos(f_i(prediction), f_i(clean)))        0 to 2, whatever encoder

Gradients go through the prediction alone. A sample adds perceptual_weight (1 - sigma) d to the error of each of its
patches, so that the step's mean over patches stays what it is. Less of it at high noise, because there the best
prediction of x0 is a mean of many pictures, and blurred, as the sampler's path needs it: to be asked for sharp
features would pull it to one of them. Weights by noise level (flow.weighting) are not applied to it: 1 / sigma^2 is for
errors that shrink with sigma.

The encoder is a ViT that transformers knows (DINOv2 and DINOv3 are), in a folder of this machine; nothing is downloaded.
It is no part of the model: not trained, saved, or known to DeepSpeed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from hdl.data.batches import Batch
from hdl.errors import HdlError
from hdl.flow.loss import patch_errors, spread
from hdl.o1.decoder import Head
from hdl.o1.patches import to_model, unpatchify

CONFIG_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
# Bytes that backward finds of a transformer's layer, a token and a hidden number, in 16 bits: Korthikanti et al. 2022,
# "Reducing Activation Recomputation in Large Transformer Models", without attention's squares.
KEPT_A_NUMBER = 34


@dataclass(frozen=True)
class Encoder:
    """What a folder says of its encoder. side: px of the square that it sees, a multiple of patch; mean, std: what its
    pictures are normalised with, of red, green and blue from 0 to 1."""

    folder: Path
    config: PreTrainedConfig
    side: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def features(self) -> int:
        return (self.side // self.patch) ** 2

    def bytes(self, dtype: torch.dtype, samples: int) -> int:
        """About what it takes on a GPU: weights, and what backward finds of so many pictures."""
        with torch.device("meta"):
            numbers = sum(p.numel() for p in AutoModel.from_config(self.config).parameters())
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        kept = samples * self.features * layers * width * KEPT_A_NUMBER * dtype.itemsize // 2
        return numbers * dtype.itemsize + kept


def read_encoder(folder: Path) -> Encoder:
    """Without its weights. HdlError for a folder that is not there or not that of a ViT."""
    if not folder.is_dir():
        raise HdlError(
            f"flow.perceptual {folder}: no such folder; expected a local one with an image encoder ({CONFIG_FILE}, "
            f"{PROCESSOR_FILE}, model.safetensors), as DINOv2's; nothing is downloaded"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        patch = config.patch_size
        layers, width = config.num_hidden_layers, config.hidden_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise HdlError(
            f"flow.perceptual {folder}: {CONFIG_FILE} is not that of a ViT that transformers knows "
            f"({str(error).splitlines()[0]}); use DINOv2, DINOv3 or the like"
        ) from None
    if not all(isinstance(found, int) and found > 0 for found in (patch, layers, width)):
        raise HdlError(
            f"flow.perceptual {folder}: patch_size {patch!r}, num_hidden_layers {layers!r} and hidden_size {width!r} in "
            f"{CONFIG_FILE}, expected whole numbers, as a ViT has them"
        )
    if not any(folder.glob("*.safetensors")):
        raise HdlError(
            f"flow.perceptual {folder}: no .safetensors there with the encoder's weights; put them there"
        )
    side, mean, std = _processor(folder / PROCESSOR_FILE)
    if side < patch:
        raise HdlError(f"flow.perceptual {folder}: pictures of {side} px, less than one patch of {patch}")
    return Encoder(folder, config, side // patch * patch, patch, mean, std)


def _processor(file: Path) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side, mean and std. HdlError when they are not there."""
    try:
        said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        cropped = said.get("do_center_crop") and said.get("crop_size")
        size = cropped or said["size"]
        side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        mean, std = (tuple(float(x) for x in said[name]) for name in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean {mean}, image_std {std}")
        return int(side), mean, std
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HdlError(
            f"flow.perceptual {file}: expected size (or crop_size), image_mean and image_std of three colours, as "
            f"transformers' image processors save them ({type(error).__name__}: {error})"
        ) from None


class Perceptual:
    """The encoder with its weights."""

    def __init__(
        self, encoder: Encoder, weight: float, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """weight: of the distance in the loss. HdlError when the weights cannot be read."""
        self.encoder, self.weight, self.dtype = encoder, weight, dtype
        try:
            model = AutoModel.from_pretrained(
                encoder.folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise HdlError(
                f"flow.perceptual {encoder.folder}: the encoder cannot be loaded ({reason})"
            ) from None
        self.model = model.to(device).requires_grad_(False).eval()
        colours = torch.tensor([encoder.mean, encoder.std], device=device)[:, None, :, None, None]
        self.mean, self.std = colours  # [1, 3, 1, 1]

    def factors(self, sigma: Tensor) -> Tensor:
        """What a sample's distance is multiplied with in the loss, of sigma [B]."""
        return self.weight * (1.0 - sigma)

    def measure(self, batch: Batch, target: Tensor) -> Callable[[Tensor, Head], Tensor]:
        """For O1.forward: float32 [2, P], each patch's error against target [P, 3072], and its sample's distance from
        its own picture."""

        def errors_and_distances(hidden: Tensor, head: Head) -> Tensor:
            x_pred, x0 = head(hidden), to_model(batch.patches)
            distances = self.distances(x_pred, x0, batch)
            return torch.stack([patch_errors(x_pred, target), spread(distances, batch.patch_counts)])

        return errors_and_distances

    def distances(self, x_pred: Tensor, x0: Tensor, batch: Batch) -> Tensor:
        """float32 [B], of x_pred and x0 [P, 3072] in [-1, 1]; differentiable in x_pred."""
        with torch.no_grad():
            wanted = self._features(x0, batch)
        return (1.0 - F.cosine_similarity(self._features(x_pred, batch), wanted, dim=-1)).mean(dim=1)

    def _features(self, patches: Tensor, batch: Batch) -> Tensor:
        """float32 [B, n, D] of every sample's picture."""
        seen = []
        for part, segment in zip(patches.split(batch.patch_counts), batch.layout.segments):
            picture = unpatchify(part.float(), segment.rows, segment.cols).permute(2, 0, 1)[None]
            # pixels are squeezed, not cut: each counts, and prediction and clean picture are squeezed alike
            size = (self.encoder.side, self.encoder.side)
            seen.append(F.interpolate(picture, size, mode="bicubic", align_corners=False, antialias=True))
        pixels = ((torch.cat(seen) + 1.0) / 2.0 - self.mean) / self.std
        features: Tensor = self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state
        return features[:, -self.encoder.features :].float()  # class and register tokens come first
