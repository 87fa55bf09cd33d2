"""The x0 error on samples that are not trained on: whether the adapter learns what it will be asked for.

There are a fixed number of measurements, each of one sample at its own noise and noise level. Both are functions of
the run's seed and of the measurement's number, and the levels are spread evenly over (0, 1), so that the same is
measured every time, whatever the number of ranks. Samples come again where fewer are held out.

Every rank makes its share of the measurements, one forward each. Under ZeRO-3 a forward is a collective, so all ranks
make equally many: some are made twice where the division leaves a remainder.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from hdl.config import Flow, Run
from hdl.data.batches import pack
from hdl.data.fetch import ShardLost
from hdl.data.mixture import Mixture
from hdl.data.samples import Sample
from hdl.engine.processes import Processes
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS
from hdl.flow.sigma import draw_sigmas
from hdl.flow.step import flow_matching_loss
from hdl.o1.visual import VisualTower
from hdl.report.curves import band_sums
from hdl.seeds import derive_seed


@dataclass(frozen=True)
class Measured:
    """loss: mean x0 error over the measurements; bands: from band_sums."""

    loss: float
    bands: Tensor


class HeldOut:
    """dtype, fused, tower: of the run's model, as flow_matching_loss takes them. count: of measurements; 0 where nothing
    is held out."""

    def __init__(
        self, run: Run, mixture: Mixture, processes: Processes, dtype: torch.dtype, fused: bool,
        tower: VisualTower | None = None,
    ) -> None:  # fmt: skip
        self.tower, self.eyes = tower, tower.eyes if tower else None
        self.mixture, self.processes, self.dtype, self.fused = mixture, processes, dtype, fused
        self.variant = VARIANTS[run.model.variant]
        self._lost: set[str] = set()
        self.seed = derive_seed(run.train.seed, "held out")
        self.count = run.validation.held_out_samples if len(mixture.held_out) else 0
        self.sigmas = draw_sigmas(
            self.count, self.seed, 0, distribution="uniform", mean=0.0, std=1.0, shift=1.0
        )

    def measure(self, model: PeftModel) -> Measured:
        """The same on every rank, unless shards were lost. HdlError where nothing that is held out can be read."""
        was_training = model.training
        model.eval()
        rank, world = self.processes.rank, self.processes.world
        share = -(-self.count // world)
        mine = [(rank * share + i) % self.count for i in range(share)]
        with torch.no_grad():
            errors = torch.stack([self._error(model, number) for number in mine]).tolist()
        model.train(was_training)
        everyone = [error for part in self.processes.gather(errors) for error in part][: self.count]
        values = torch.tensor(everyone, dtype=torch.float64)
        return Measured(float(values.mean()), band_sums(self.sigmas, values))

    def _error(self, model: PeftModel, number: int) -> Tensor:
        sample = self._sample(number)
        batch = pack([sample], [number], len(sample.patches), eyes=self.eyes).to(self.processes.device)
        _, errors = flow_matching_loss(
            model, batch, self.sigmas, 0,
            variant=self.variant, flow=Flow(), seed=self.seed, dtype=self.dtype, fused=self.fused,
            tower=self.tower,
        )  # fmt: skip
        return errors[0].double()

    def _sample(self, number: int) -> Sample:
        """The measurement's sample; if its shard is lost, the next one that is not."""
        held_out = self.mixture.held_out
        for i in range(len(held_out)):
            try:
                return self.mixture.read(int(held_out[(number + i) % len(held_out)]), 0)
            except ShardLost as error:
                if error.shard not in self._lost:
                    self._lost.add(error.shard)
                    print(
                        f"rank {self.processes.rank}: held-out samples are lost, others measured: {error}",
                        flush=True,
                    )
        raise HdlError(
            f"no held-out sample can be read: their shards are lost ({', '.join(sorted(self._lost))}); see that they "
            "can be read, or set data.held_out 0"
        )
