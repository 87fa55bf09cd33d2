"""How far each path's numbers are from float32's, at any size: predictions and the adapter's gradients.

One random model, one adapter that does something, one batch; each path runs them forward and backward:

    float32   plain, every layer recomputed: the reference
    plain     PEFT's own modules in bfloat16
    bf16      the fused path
    fp8       the fused path with e4m3 weights
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from hdl.adapter.flat import by_name, trained_parameters
from hdl.adapter.lora import adapter_parameters, attach
from hdl.config import Lora
from hdl.data.samples import Sample
from hdl.flow.loss import patch_errors
from hdl.kernels.fuse import fuse
from hdl.kernels.noising import noise_patches
from hdl.memory.recompute import recompute_every_layer
from hdl.o1.checkpoint import Checkpoint, load_model
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import to_model

PATHS = ("plain", "bf16", "fp8")
ADAPTER_STD = 0.005  # of B: what it adds is about a tenth of what the frozen weights make


@dataclass(frozen=True)
class Distance:
    """x_pred: relative errors; gradient_error, cosine: of the adapter's matrices, the worst and the mean."""

    path: str
    x_pred: float
    x_pred_from_plain: float
    worst_gradient_error: float
    lowest_cosine: float
    mean_cosine: float
    lowest_cosine_from_plain: float
    lowest: str  # whose that is


Answer = tuple[Tensor, dict[str, Tensor]]


def distances(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    lora: Lora,
    sigma: float,
    device: torch.device,
    seed: int,
) -> Iterator[Distance]:
    """Every path against float32 and against `plain`, one after another; one model at a time is in memory."""
    ask = partial(
        _answer, checkpoint=checkpoint, samples=samples, lora=lora, sigma=sigma, device=device, seed=seed
    )
    reference = ask("float32")
    plain = reference
    for path in PATHS:
        answer = ask(path)
        plain = answer if path == "plain" else plain
        cosines = _cosines(answer[1], reference[1]).values()
        from_plain = _cosines(answer[1], plain[1])
        lowest = min(from_plain, key=from_plain.__getitem__)
        yield Distance(
            path,
            _distance(answer[0], reference[0]),
            _distance(answer[0], plain[0]),
            max(_distance(g, reference[1][name]) for name, g in answer[1].items()),
            min(cosines),
            sum(cosines) / len(cosines),
            from_plain[lowest],
            lowest.removeprefix("base_model.model.model.language_model."),
        )


def _answer(
    path: str,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    lora: Lora,
    sigma: float,
    device: torch.device,
    seed: int,
) -> Answer:
    dtype = torch.float32 if path == "float32" else torch.bfloat16
    model = adapted_model(checkpoint, lora, device, dtype, seed)
    if path == "float32":
        recompute_every_layer(model.get_base_model())  # type: ignore[arg-type]
    elif path != "plain":
        fuse(model, weights="fp8" if path == "fp8" else "full")
    return take_step(model, samples, sigma, device, dtype, seed)


def take_step(
    model: PeftModel,
    samples: Sequence[Sample],
    sigma: float,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Answer:
    """x_pred of a batch at noise level sigma, and the gradients of the adapter's matrices; float32, on the CPU."""
    model.zero_grad()
    layout = lay_out([Segment(len(s.input_ids), s.rows, s.cols) for s in samples]).to(device)
    counts = [segment.patches for segment in layout.segments]
    pixels = torch.cat([s.patches for s in samples]).to(device)
    levels = torch.full((len(samples),), sigma, device=device)
    z = noise_patches(
        pixels, levels, counts, list(range(seed, seed + len(samples))), noise_scale=8.0, clip=None, dtype=dtype
    )  # fmt: skip
    text = torch.cat([s.text_embeds for s in samples]).to(device)
    x_pred = model(text, z, 1 - levels, layout)
    patch_errors(x_pred, to_model(pixels)).mean().backward()
    gradients = by_name(model, {name: p.grad for name, p in trained_parameters(model).items()})  # type: ignore[misc]
    return x_pred.detach().float().cpu(), {name: g.float().cpu() for name, g in gradients.items()}


def adapted_model(
    checkpoint: Checkpoint, lora: Lora, device: torch.device, dtype: torch.dtype, seed: int
) -> PeftModel:
    """The same weights in every dtype: those of bfloat16."""
    base = load_model(checkpoint, device, torch.bfloat16).to(dtype)
    model = attach(base, lora, "", seed)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in adapter_parameters(model).items():
        if ".lora_B." in name:
            p.data.normal_(0, ADAPTER_STD, generator=generator)
        p.data = p.data.bfloat16().to(dtype)
    return model


def compare(a: Answer, b: Answer) -> tuple[float, dict[str, float]]:
    """The relative distance of x_pred from b's, and the cosine of every gradient with b's, by name."""
    return _distance(a[0], b[0]), _cosines(a[1], b[1])


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _cosines(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {n: float(torch.cosine_similarity(a[n].flatten(), b[n].flatten(), dim=0)) for n in b}
