"""The perceptual part of the loss against a computation of its own, and what it needs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from hdl.config import Flow
from hdl.data.batches import Batch
from hdl.errors import HdlError
from hdl.flow.loss import loss_weights, patch_errors
from hdl.flow.noise import VARIANTS, noise_keys
from hdl.flow.perceptual import Perceptual, read_encoder
from hdl.flow.step import flow_matching_loss
from hdl.kernels.noising import noise_patches
from hdl.o1.decoder import O1
from hdl.o1.patches import to_model
from tests.flow.encoders import PROCESSOR, save_encoder
from tests.flow.test_flow import batch_of, tiny_model

GRIDS, LEVELS = [(1, 2), (3, 1)], torch.tensor([0.3, 0.8])
FULL = VARIANTS["full"]


@pytest.fixture(autouse=True)
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def a_batch() -> Batch:
    batch = batch_of(GRIDS, [0, 1], 9)  # 4 patches more are in other micro-batches
    return replace(
        batch, text=torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), weights=[1.0, 0.5]
    )


def perceptual_of(folder: Path, weight: float = 0.7) -> Perceptual:
    return Perceptual(read_encoder(folder), weight, "cpu", torch.float32)


def predicted(model: O1, batch: Batch) -> Tensor:
    keys = noise_keys(batch.places, 1, 3)
    z = noise_patches(
        batch.patches, LEVELS, batch.patch_counts, keys, noise_scale=8.0, clip=None, dtype=torch.float32
    )
    return model(batch.text, z, 1 - LEVELS, batch.layout)


def by_hand(patches: Tensor, rows: int, cols: int, encoder: torch.nn.Module) -> Tensor:
    """Patch features [16, D] of a picture put together square by square."""
    picture = torch.zeros(3, 32 * rows, 32 * cols)
    for i, patch in enumerate(patches):
        top, left = 32 * (i // cols), 32 * (i % cols)
        picture[:, top : top + 32, left : left + 32] = patch.view(3, 32, 32)
    squeezed = F.interpolate(picture[None], (28, 28), mode="bicubic", antialias=True)[0]
    mean, std = (torch.tensor(PROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (squeezed * 0.5 + 0.5 - mean) / std
    return encoder(pixel_values=pixels[None]).last_hidden_state[0, -16:]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_loss_and_gradient_are_those_of_a_direct_computation(tmp_path: Path, kind: str, fused: bool) -> None:
    model, batch, flow = tiny_model(), a_batch(), Flow(weighting="velocity")
    trained = model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    perceptual = perceptual_of(save_encoder(tmp_path, kind))
    loss, errors = flow_matching_loss(
        model, batch, LEVELS, 3, variant=FULL, flow=flow, seed=1, fused=fused, perceptual=perceptual
    )
    plain, plain_errors = flow_matching_loss(
        model, batch, LEVELS, 3, variant=FULL, flow=flow, seed=1, fused=fused
    )
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    part, x_pred, x0 = torch.zeros(()), predicted(model, batch), to_model(batch.patches)
    for i, ((rows, cols), own) in enumerate(zip(GRIDS, (slice(0, 2), slice(2, 5)))):
        wanted = by_hand(x0[own], rows, cols, encoder).detach()
        found = by_hand(x_pred[own], rows, cols, encoder)
        distance = sum(1 - a @ b / (a.norm() * b.norm()) for a, b in zip(found, wanted)) / 16
        part = part + 0.7 * (1 - LEVELS[i]) * batch.weights[i] * distance * rows * cols / 9
    assert float(part) > 0.01  # there is something to see
    assert float(loss) == pytest.approx(float(plain + part), rel=1e-5)
    assert torch.allclose(errors, plain_errors, rtol=1e-5)  # the x0 errors, without it
    gradient, expected, without = (
        torch.autograd.grad(x, trained, retain_graph=True)[0] for x in (loss, plain + part, plain)
    )
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    only, by_itself = gradient - without, expected - without
    assert (only - by_itself).norm() < 1e-2 * by_itself.norm()  # however small it is beside the rest
    assert all(p.grad is None and not p.requires_grad for p in perceptual.model.parameters())
    assert not perceptual.model.training


def test_a_clean_prediction_is_no_distance_away_and_packs_do_not_matter(tmp_path: Path) -> None:
    perceptual, batch = perceptual_of(save_encoder(tmp_path)), a_batch()
    x0 = to_model(batch.patches)
    assert perceptual.distances(x0, x0, batch).abs().max() < 1e-5
    noisy = x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    together = perceptual.distances(noisy, x0, batch)
    alone = batch_of(GRIDS[1:], [1], 9)
    apart = perceptual.distances(noisy[2:], x0[2:], alone)
    assert torch.allclose(together[1:], apart, rtol=1e-4) and float(apart) > 0.01


@pytest.mark.parametrize("weighting", ["x0", "velocity"])
def test_without_it_the_loss_is_the_same_to_the_bit(weighting: str) -> None:
    """The flow-matching loss as it is written down, with nothing added."""
    model, batch = tiny_model(), a_batch()
    loss, _ = flow_matching_loss(
        model, batch, LEVELS, 3, variant=FULL, flow=Flow(weighting=weighting), seed=1
    )
    factors = loss_weights(LEVELS, weighting, 8.0, 5.0) * torch.tensor(batch.weights)
    each = factors.repeat_interleave(torch.tensor(batch.patch_counts))
    errors = patch_errors(predicted(model, batch), to_model(batch.patches))
    assert torch.equal(loss, (errors * each).sum() / 9)


def test_bytes_are_the_weights_and_what_is_kept(tmp_path: Path) -> None:
    encoder = read_encoder(save_encoder(tmp_path))
    numbers = sum(p.numel() for p in perceptual_of(tmp_path).model.parameters())
    assert encoder.bytes(torch.bfloat16, 0) == 2 * numbers
    assert encoder.bytes(torch.float32, 2) - encoder.bytes(torch.float32, 1) == 16 * 2 * 16 * 34 * 2
    assert (encoder.side, encoder.patch, encoder.features) == (28, 7, 16)  # 30 rounded down to whole patches


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("folder", "no such folder; expected a local one with an image encoder .* nothing is downloaded"),
        ("config", r"config.json is not that of a ViT that transformers knows"),
        ("kind", r"config.json is not that of a ViT that transformers knows .*use DINOv2"),
        ("weights", r"no \.safetensors there"),
        ("processor", r"preprocessor_config.json: expected size .*FileNotFoundError"),
        ("colours", r"preprocessor_config.json: expected size .* image_mean \(0\.5,\)"),
        ("side", "pictures of 6 px, less than one patch of 7"),
    ],
)
def test_what_is_no_encoder_is_named(tmp_path: Path, spoil: str, message: str) -> None:
    folder = save_encoder(tmp_path / "encoder")
    processor = folder / "preprocessor_config.json"
    if spoil == "folder":
        folder = tmp_path / "facebook" / "dinov2-base"
    elif spoil == "config":
        (folder / "config.json").unlink()
    elif spoil == "kind":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    elif spoil == "weights":
        (folder / "model.safetensors").unlink()
    elif spoil == "processor":
        processor.unlink()
    else:
        said = {"image_mean": [0.5]} if spoil == "colours" else {"crop_size": 6}
        processor.write_text(json.dumps(PROCESSOR | said))
    with pytest.raises(HdlError, match=message):
        read_encoder(folder)


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    encoder = read_encoder(save_encoder(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(HdlError, match="the encoder cannot be loaded"):
        Perceptual(encoder, 1.0, "cpu", torch.float32)
