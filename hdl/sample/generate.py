"""Draw pictures: several prompts at once, as one packed run.

With guidance every picture is two samples of the run, one with its prompt and one with the empty
prompt, and v = v_u + g (v_c - v_u). Its reference images, if it has any, go with both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hdl.flow.loss import velocity
from hdl.flow.noise import VARIANTS, clip_noise
from hdl.o1.decoder import References
from hdl.o1.layout import Grid, Seen, Segment, lay_out
from hdl.o1.patches import PATCH, PATCH_DIM, patchify, to_pixels, unpatchify
from hdl.sample.reading import Predict, predictor
from hdl.sample.schedulers import DEV_TIMESTEPS, Flash, FlowMatchEuler, Scheduler, UniPC

EDIT_NOISE_SCALE = 8.0  # dev's, where it edits


@dataclass(frozen=True)
class Shown:
    """The reference images of one picture. patches [R, 3072]: clean, in [-1, 1], of grids; deepstack: [V, D] for
    each of the decoder's first layers; seen: where the images stand in the picture's prompt; empty_text,
    empty_seen: the unconditional prompt that holds the same images."""

    grids: tuple[Grid, ...]
    patches: Tensor
    deepstack: Sequence[Tensor]
    seen: tuple[Seen, ...]
    empty_text: Tensor
    empty_seen: tuple[Seen, ...]


@dataclass(frozen=True)
class Request:
    """One picture: text embeddings [L, D] of its prompt, its size in pixels and its seed."""

    text: Tensor
    height: int
    width: int
    seed: int
    shown: Shown | None = None

    @property
    def patches(self) -> int:
        return (self.height // PATCH) * (self.width // PATCH)


@dataclass(frozen=True)
class SamplerSettings:
    """variant "full": UniPC with `steps`, `guidance_scale` and `shift`; "dev": its 28 fixed steps, unguided."""

    variant: str
    steps: int
    guidance_scale: float
    shift: float


@dataclass(frozen=True)
class Pack:
    """Requests as one packed run, with the empty prompt beside each where they are guided."""

    requests: Sequence[Request]
    guided: bool
    predict: Predict = field(repr=False)

    @classmethod
    def of(
        cls, model: nn.Module, requests: Sequence[Request], empty_text: Tensor, guided: bool,
        device: torch.device | str, *, read_once: bool = True,
    ) -> "Pack":  # fmt: skip
        """read_once: as `predictor` takes it."""
        texts = [r.text for r in requests]
        segments = [segment_of(r) for r in requests]
        if guided:
            for r in requests:
                texts.append(r.shown.empty_text if r.shown else empty_text)
                segments.append(_segment(r, len(texts[-1]), r.shown.empty_seen if r.shown else ()))
        layout = lay_out(segments).to(device)
        shown = [r.shown for r in requests if r.shown] * (2 if guided else 1)
        references = None
        if shown:
            deepstack = [torch.cat(level).to(device) for level in zip(*(s.deepstack for s in shown))]
            references = References(torch.cat([s.patches for s in shown]).to(device), deepstack)
        text = torch.cat([t.to(device) for t in texts])
        return cls(requests, guided, predictor(model, text, layout, references, once=read_once))

    def velocity(self, z: Tensor, timestep: int, guidance_scale: float) -> Tensor:
        """The direction in which z [P, 3072] of all requests goes at a timestep of 0..1000."""
        sigma = timestep / 1000
        t = torch.full((len(self.requests) * (1 + self.guided),), 1.0 - sigma, device=z.device)
        x_pred = self.predict(torch.cat([z, z]) if self.guided else z, t).float()
        if not self.guided:
            return velocity(x_pred, z, sigma)
        conditional, unconditional = (velocity(x, z, sigma) for x in x_pred.chunk(2))
        return unconditional + guidance_scale * (conditional - unconditional)


def generate(
    model: nn.Module,
    requests: Sequence[Request],
    empty_text: Tensor,
    settings: SamplerSettings,
    device: torch.device | str,
    *,
    read_once: bool = True,
    on_step: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """Draw every request with the variant's own sampler; uint8 [H, W, 3] each, on the CPU.

    model: an O1 (adapted or not). empty_text [L, D]: the embedding of the unconditional prompt. read_once: as
    `predictor` takes it. on_step: called after each step. The pictures do not depend on what else is drawn in
    the same call; of several, all have the same number of reference images, if that is one.
    """
    editing = {len(r.shown.grids) if r.shown else 0 for r in requests} == {1}
    scheduler, noise_scale, clip = _sampler(settings, editing)
    guidance = settings.guidance_scale if settings.variant == "full" else 0.0
    generators = [initial_generator(request) for request in requests]
    z = torch.cat([initial_noise(r, g, noise_scale) for r, g in zip(requests, generators)])

    def step_noise(i: int) -> Tensor:
        drawn = [torch.randn(r.patches, PATCH_DIM, generator=g) for r, g in zip(requests, generators)]
        return torch.cat([clip_noise(noise, clip) for noise in drawn])

    pack = Pack.of(model, requests, empty_text, is_guided(guidance), device, read_once=read_once)
    final = denoise(pack, z.to(device), scheduler, guidance, step_noise, on_step)
    return _cut(to_pixels(final).cpu(), requests)


def _sampler(settings: SamplerSettings, editing: bool) -> tuple[Scheduler, float, float | None]:
    """A variant's scheduler, noise scale and where it clips."""
    variant = VARIANTS[settings.variant]
    if settings.variant == "full":
        return UniPC(settings.steps, settings.shift), variant.noise_scale, variant.clip
    if editing:
        return FlowMatchEuler(), EDIT_NOISE_SCALE, None
    return Flash(variant.noise_scale), variant.noise_scale, variant.clip


def steps_of(settings: SamplerSettings) -> int:
    return settings.steps if settings.variant == "full" else len(DEV_TIMESTEPS)


def is_guided(guidance_scale: float) -> bool:
    """At 0 and 1 the unconditional prompt plays no part."""
    return guidance_scale not in (0.0, 1.0)


def initial_generator(request: Request) -> torch.Generator:
    """On the CPU, seeded as the model's own code seeds it: with the request's seed + 1."""
    return torch.Generator().manual_seed(request.seed + 1)


def initial_noise(request: Request, generator: torch.Generator, noise_scale: float) -> Tensor:
    """[P, 3072]: noise_scale times a standard normal image, drawn as an image and then cut into patches."""
    image = torch.randn(1, 3, request.height, request.width, generator=generator)[0]
    return noise_scale * patchify(image.permute(1, 2, 0))


@torch.no_grad()
def denoise(
    pack: Pack,
    z: Tensor,
    scheduler: Scheduler,
    guidance_scale: float,
    step_noise: Callable[[int], Tensor],
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """From noise z [P, 3072] float32 of all requests to the clean patches [P, 3072].

    step_noise(i): standard normal like z for step i, clipped where the variant clips; used by stochastic
    schedulers only.
    """
    for i, timestep in enumerate(scheduler.timesteps):
        v = pack.velocity(z, timestep, guidance_scale)
        noise = step_noise(i).to(z.device) if scheduler.stochastic else None
        z = scheduler.step(i, v, z, noise)
        on_step()
    return z


def segment_of(request: Request) -> Segment:
    """Its place in a packed run, with its own prompt."""
    return _segment(request, len(request.text), request.shown.seen if request.shown else ())


def _segment(request: Request, text: int, seen: tuple[Seen, ...]) -> Segment:
    grids = request.shown.grids if request.shown else ()
    return Segment(text, request.height // PATCH, request.width // PATCH, grids, seen)


def _cut(pixels: Tensor, requests: Sequence[Request]) -> list[Tensor]:
    runs = pixels.split([r.patches for r in requests])
    return [unpatchify(p, r.height // PATCH, r.width // PATCH) for p, r in zip(runs, requests)]
