"""Pictures of the validation prompts while training, without and with the adapter, and with its average where the run
keeps one, all from the same seeds.

Every rank draws its share of the prompts. Under ZeRO-3 a forward pass is a collective, so all ranks draw
equally many: some prompts are drawn twice where the division leaves a remainder, and dropped again.
"""

from pathlib import Path

from peft import PeftModel
from PIL import Image
from torch import Tensor

from hdl.config import Run
from hdl.engine.ema import Average
from hdl.engine.processes import Processes
from hdl.o1.checkpoint import Checkpoint
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.sample.generate import Request, SamplerSettings, generate
from hdl.sample.grid import picture_grid

WITHOUT, WITH, WITH_AVERAGE = "without adapter", "with adapter", "with the average"


class Validation:
    def __init__(self, run: Run, checkpoint: Checkpoint, processes: Processes) -> None:
        settings = run.validation
        self.prompts = settings.prompts
        self.processes = processes
        self.sampler = SamplerSettings(
            run.model.variant, settings.steps, settings.guidance_scale, settings.shift
        )
        self._without: list[Tensor] | None = None  # never changes while the adapter learns
        self.encoder: PromptEncoder | None = None
        if self.prompts:
            self.encoder = encoder = PromptEncoder(checkpoint)
            self.empty = encoder.embed(encoder.ids(UNCONDITIONAL_PROMPT))
            self.requests = [
                Request(encoder.embed(encoder.ids(p)), settings.height, settings.width, settings.seed + i)
                for i, p in enumerate(self.prompts)
            ]

    def draw(self, model: PeftModel, average: Average | None = None) -> dict[str, list[Tensor]]:
        """Every prompt's picture, uint8 [H, W, 3], on every rank: WITHOUT, WITH the adapter and WITH_AVERAGE, if there
        is one."""
        was_training = model.training
        model.eval()
        if self._without is None:
            with model.disable_adapter():
                self._without = self._draw_all(model)
        drawn = {WITHOUT: self._without, WITH: self._draw_all(model)}
        if average:
            with average.in_the_model():
                drawn[WITH_AVERAGE] = self._draw_all(model)
        model.train(was_training)
        return drawn

    def grid(self, drawn: dict[str, list[Tensor]]) -> Image.Image:
        """A row a prompt."""
        return picture_grid([list(row) for row in zip(*drawn.values())], list(drawn), self.prompts)

    def _draw_all(self, model: PeftModel) -> list[Tensor]:
        rank, world = self.processes.rank, self.processes.world
        share = -(-len(self.requests) // world)
        mine = [self.requests[(rank * share + i) % len(self.requests)] for i in range(share)]
        drawn = generate(model, mine, self.empty, self.sampler, self.processes.device)
        everyone = [picture for pictures in self.processes.gather(drawn) for picture in pictures]
        return everyone[: len(self.requests)]


def save_picture(image: Image.Image, folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}.png"
    image.save(path)
    return path
