"""What a run shows while it runs: TensorBoard curves and pictures, and a progress bar, on rank 0."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hdl.sample.grid import as_tensor
from hdl.transfer import send

BANDS = 4  # noise levels are reported in equal bands of sigma


def band_sums(sigmas: Tensor, errors: Tensor, which: Tensor | None = None) -> Tensor:
    """float64 [2, BANDS]: the summed x0 error and the number of samples in each band of sigma.

    sigmas: float32 [B] and which: bool [B], those that count (None: all), in host memory; errors: float32 [B]
    anywhere, and there the sums are. The host does not wait for them.
    """
    band = (sigmas * BANDS).long().clamp(max=BANDS - 1)
    counts = torch.ones(len(sigmas), dtype=torch.bool) if which is None else which
    belongs = send((band[:, None] == torch.arange(BANDS)) & counts[:, None], errors.device)
    sums = torch.where(belongs, errors.double()[:, None], 0.0).sum(dim=0)
    return torch.stack([sums, belongs.double().sum(dim=0)])


def means_by_band(name: str, bands: Tensor) -> dict[str, float]:
    """The mean error in each band of sigma that has samples, by the curve's name. bands: from band_sums."""
    return {
        f"{name}/sigma_{i / BANDS:.2f}-{(i + 1) / BANDS:.2f}": total / count
        for i, (total, count) in enumerate(bands.T.tolist())
        if count
    }


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all ranks."""

    loss: float
    bands: Tensor  # from band_sums
    grad_norm: float
    lr: float
    images: int
    tokens: int
    seconds: float
    peak_memory: float  # GiB reserved on rank 0's GPU, CUDA graphs' included; on a CPU, of the process
    waited: float = 0.0  # seconds that rank 0 waited for data
    waste: float | None = None  # share of the packs' budget left unused, where packs have one
    kept: float | None = None  # mean distance of kept samples from the base's prediction


class Reporter:
    """Rank 0's; the other ranks have none."""

    def __init__(self, folder: Path, first_step: int, steps: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.bar = tqdm(total=steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True)
        self._steps: list[tuple[float, int, int, float]] = []  # seconds, images, tokens, seconds waited
        self._peak = 0.0

    def step(self, step: int, report: StepReport) -> None:
        """Report the step that brought the run to `step` steps."""
        seconds = report.seconds
        self._steps.append((seconds, report.images, report.tokens, report.waited))
        self._peak = report.peak_memory
        scalars = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "speed/images_per_second": report.images / seconds,
            "speed/tokens_per_second": report.tokens / seconds,
            "speed/seconds_per_step": seconds,
            "memory/peak_gib": report.peak_memory,
            "data/wait": report.waited / seconds,
        }
        if report.waste is not None:
            scalars["data/waste"] = report.waste
        if report.kept is not None:
            scalars["preserve/error"] = report.kept
        self.scalars(step, scalars | means_by_band("x0_error", report.bands))
        self.bar.set_postfix_str(
            f"loss {report.loss:.4f}, {report.images / seconds:.1f} images/s, peak {report.peak_memory:.1f} GiB"
        )
        self.bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def saved(self, step: int, stall: float) -> None:
        """stall: seconds that the checkpoint after `step` steps kept the training waiting."""
        self.writer.add_scalar("save/stall_seconds", stall, step)

    def skipped(self, step: int, count: int, line: str) -> None:
        """count: steps skipped so far, this one included."""
        self.writer.add_scalar("skipped_steps", count, step)
        self.say(line)
        self.bar.update()

    def picture(self, step: int, image: Image.Image) -> None:
        self.writer.add_image("validation", as_tensor(image), step, dataformats="HWC")
        self.flush()

    def flush(self) -> None:
        """Everything reported so far is on disk."""
        self.writer.flush()

    def say(self, line: str) -> None:
        self.bar.write(line)

    def close(self) -> None:
        self.bar.close()
        if self._steps:
            warm = self._steps[len(self._steps) // 4 :]  # the first steps warm up
            seconds, images, tokens, waited = (sum(column) for column in zip(*warm))
            print(
                f"{len(self._steps)} steps, median {statistics.median(step[0] for step in warm):.3f} s a step "
                f"({images / seconds:.2f} images/s, {tokens / seconds:.0f} tokens/s), {waited / seconds:.1%} of the time "
                f"waiting for data, peak {self._peak:.1f} GiB"
            )
        self.writer.close()
