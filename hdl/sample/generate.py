"""Draw pictures: several prompts at once, as one packed run.

With guidance every picture is two samples of the run, one with its prompt and one with the empty
prompt, and v = v_u + g (v_c - v_u).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdl.flow.loss import velocity
from hdl.flow.noise import VARIANTS, clip_noise
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import PATCH, PATCH_DIM, patchify, to_pixels, unpatchify
from hdl.sample.schedulers import Flash, Scheduler, UniPC


@dataclass(frozen=True)
class Request:
    """One picture: text embeddings [L, D] of its prompt, its size in pixels and its seed."""

    text: Tensor
    height: int
    width: int
    seed: int


@dataclass(frozen=True)
class SamplerSettings:
    """variant "full": UniPC with `steps`, `guidance_scale` and `shift`; "dev": its 28 fixed steps, unguided."""

    variant: str
    steps: int
    guidance_scale: float
    shift: float


def generate(
    model: Callable[..., Tensor],
    requests: Sequence[Request],
    empty_text: Tensor,
    settings: SamplerSettings,
    device: torch.device | str,
) -> list[Tensor]:
    """Draw every request with the variant's own sampler; uint8 [H, W, 3] each, on the CPU.

    model: an O1 (adapted or not), called as model(text, z, t, layout). empty_text [L, D]: the embedding of
    the unconditional prompt. The pictures do not depend on what else is drawn in the same call.
    """
    variant = VARIANTS[settings.variant]
    generators = [initial_generator(request) for request in requests]
    z = torch.cat([initial_noise(r, g, variant.noise_scale) for r, g in zip(requests, generators)])
    if settings.variant == "full":
        scheduler: Scheduler = UniPC(settings.steps, settings.shift)
        guidance = settings.guidance_scale
    else:
        scheduler, guidance = Flash(variant.noise_scale), 0.0

    def step_noise(i: int) -> Tensor:
        drawn = [torch.randn(_patches(r), PATCH_DIM, generator=g) for r, g in zip(requests, generators)]
        return torch.cat([clip_noise(noise, variant.clip) for noise in drawn])

    final = denoise(model, requests, empty_text, z.to(device), scheduler, guidance, step_noise)
    return _cut(to_pixels(final).cpu(), requests)


def initial_generator(request: Request) -> torch.Generator:
    """On the CPU, seeded as the model's own code seeds it: with the request's seed + 1."""
    return torch.Generator().manual_seed(request.seed + 1)


def initial_noise(request: Request, generator: torch.Generator, noise_scale: float) -> Tensor:
    """[P, 3072]: noise_scale times a standard normal image, drawn as an image and then cut into patches."""
    image = torch.randn(1, 3, request.height, request.width, generator=generator)[0]
    return noise_scale * patchify(image.permute(1, 2, 0))


@torch.no_grad()
def denoise(
    model: Callable[..., Tensor],
    requests: Sequence[Request],
    empty_text: Tensor,
    z: Tensor,
    scheduler: Scheduler,
    guidance_scale: float,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """From noise z [P, 3072] float32 of all requests to the clean patches [P, 3072].

    guidance_scale 0 or 1 draws unguided. step_noise(i): standard normal like z for step i, clipped
    where the variant clips; used by stochastic schedulers only.
    """
    guided = guidance_scale not in (0.0, 1.0)
    texts = [r.text for r in requests]
    segments = [Segment(len(r.text), r.height // PATCH, r.width // PATCH) for r in requests]
    if guided:
        texts += [empty_text] * len(requests)
        segments += [Segment(len(empty_text), s.rows, s.cols) for s in segments]
    layout = lay_out(segments).to(z.device)
    text = torch.cat([t.to(z.device) for t in texts])
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = timestep / 1000
        t = torch.full((len(segments),), 1.0 - sigma, device=z.device)
        x_pred = model(text, torch.cat([z, z]) if guided else z, t, layout).float()
        if guided:
            conditional, unconditional = (velocity(x, z, sigma) for x in x_pred.chunk(2))
            v = unconditional + guidance_scale * (conditional - unconditional)
        else:
            v = velocity(x_pred, z, sigma)
        noise = step_noise(i).to(z.device) if scheduler.stochastic else None
        z = scheduler.step(i, v, z, noise)
    return z


def _patches(request: Request) -> int:
    return (request.height // PATCH) * (request.width // PATCH)


def _cut(pixels: Tensor, requests: Sequence[Request]) -> list[Tensor]:
    runs = pixels.split([_patches(r) for r in requests])
    return [unpatchify(p, r.height // PATCH, r.width // PATCH) for p, r in zip(runs, requests)]
