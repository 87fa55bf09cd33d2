"""How far an adapter moves the model's predictions: where it should not (drift), and where it should (change).

A prompt is followed from noise to picture as the base draws it, in a few coarse steps from the same noise each time:

    z_i = (1 - sigma_i) x_{i-1} + sigma_i s eps        x_i: the base's prediction at z_i; sigma_0 nearly 1

and at every z_i the adapter's prediction is held against the base's. The distance is their root mean square
difference, of pixel values in [-1, 1]. Over prompts without the trigger it is the drift, over the same ones with the
trigger the change; their ratio is what an adapter costs of what it gives. No encoder and no picture is needed.

Every rank takes its share of the prompts. Under ZeRO-3 a forward pass is a collective, so all take equally many.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from hdl.adapter.lora import Switch
from hdl.engine.processes import Processes
from hdl.flow.noise import Variant, clip_noise
from hdl.o1.layout import lay_out
from hdl.report.curves import BANDS
from hdl.sample.generate import Request, initial_generator, initial_noise, segment_of

LEVELS = 2 * BANDS  # of noise, from the highest down: two a band


@dataclass(frozen=True)
class Distances:
    """Root mean square differences of predictions. drift_by_band: from little noise to much."""

    drift: float
    change: float
    drift_by_band: tuple[float, ...]

    @property
    def relative(self) -> float:
        """Drift as a share of the change; 0 where nothing has been learnt."""
        return self.drift / self.change if self.change else 0.0

    def curves(self) -> dict[str, float]:
        """By TensorBoard's names."""
        bands = {
            f"drift/sigma_{i / BANDS:.2f}-{(i + 1) / BANDS:.2f}": d for i, d in enumerate(self.drift_by_band)
        }
        return {"drift": self.drift, "change": self.change, "drift/relative": self.relative} | bands


class Drift:
    """Of an adapter in training. without, with_trigger: the same prompts, as requests to draw."""

    def __init__(
        self, without: Sequence[Request], with_trigger: Sequence[Request], processes: Processes, variant: Variant,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        assert len(without) == len(with_trigger) > 0
        self.without, self.with_trigger = without, with_trigger
        self.processes, self.variant, self.dtype = processes, variant, dtype

    @torch.no_grad()
    def measure(self, model: PeftModel) -> Distances:
        """The same on every rank."""
        was_training, switch = model.training, Switch(model)
        model.eval()
        rank, world = self.processes.rank, self.processes.world
        count = len(self.without)
        share = -(-count // world)
        mine = [(rank * share + i) % count for i in range(share)]
        apart = [
            torch.stack([self._along(switch, requests[i]) for requests in (self.without, self.with_trigger)])
            for i in mine
        ]
        model.train(was_training)
        everyone = [pair for part in self.processes.gather([a.cpu() for a in apart]) for pair in part][:count]
        drift, change = torch.stack(everyone).mean(dim=0)
        bands = drift.view(BANDS, -1).mean(dim=1).flip(0)
        return Distances(
            float(drift.mean().sqrt()), float(change.mean().sqrt()), tuple(bands.sqrt().tolist())
        )

    def _along(self, switch: Switch, request: Request) -> Tensor:
        """float64 [LEVELS]: the mean squared difference at each level, from the highest down."""
        device, model = self.processes.device, switch.model
        layout = lay_out([segment_of(request)]).to(device)
        text = request.text.to(device, self.dtype)
        eps = clip_noise(initial_noise(request, initial_generator(request), 1.0), self.variant.clip).to(
            device
        )
        found = torch.zeros(LEVELS, dtype=torch.float64, device=device)
        clean = torch.zeros_like(eps)
        for i in range(LEVELS):
            sigma = 1 - (i + 0.5) / LEVELS
            z = ((1 - sigma) * clean + sigma * self.variant.noise_scale * eps).to(self.dtype)
            t = torch.full((1,), 1 - sigma, device=device)
            with switch.off() as base:
                clean = base(text, z, t, layout).float()
            found[i] = (model(text, z, t, layout).float() - clean).square().mean()
        return found
