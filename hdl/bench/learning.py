"""Whether the fast paths learn what the plain one learns: the same runs on the small O1, path by path.

    plain       PEFT's own modules: what the others are held against
    regrouped   the same in two micro-batches: the same numbers but for the order of sums. Training amplifies
                roundings, the more the higher the rate; this curve's distance is what they alone come to
    fused       the fused path
    fp8         the fused path with e4m3 weights

Each run is a real one (hdl.engine.loop.train) on a style set. Its adapter is then judged outside of it:
the x0 error of a float32 model on pictures of the same kind it never saw, at fixed noise and noise levels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.adapter.lora import open_adapter
from hdl.config import load_run
from hdl.data.batches import pack
from hdl.data.prepare import Options, prepare
from hdl.data.shards import Shards
from hdl.engine.loop import train
from hdl.engine.processes import Processes
from hdl.flow.loss import patch_errors
from hdl.kernels.noising import noise_patches
from hdl.mini.style_set import write_style_set
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.patches import to_model

BASE = Path(__file__).resolve().parents[1] / "mini" / "o1-mini"
PATHS = {
    "plain": ["--model.kernels", "plain"],
    "regrouped": ["--model.kernels", "plain"],
    "fused": ["--model.kernels", "fused"],
    "fp8": ["--model.kernels", "fused", "--model.weights", "fp8"],
    "nf4": ["--model.kernels", "fused", "--model.weights", "nf4"],
}
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
HELD_OUT_SEED = 1000
AT_ONCE = 16


@dataclass(frozen=True)
class Learned:
    """losses: of every step. held_out: mean x0 error on unseen pictures, before any training: 'untrained'."""

    path: str
    seed: int
    losses: list[float]
    held_out: float


class Learning:
    """The data, and runs on it. out: a new folder; pictures: in the style, and as many plain ones."""

    def __init__(self, out: Path, pictures: int, processes: Processes) -> None:
        self.out, self.processes = out, processes
        self.shards, self.held_out = (
            _prepared(out / name, pictures, seed) for name, seed in (("set", 0), ("held-out", HELD_OUT_SEED))
        )

    def run(self, path: str, seed: int, steps: int, batch_size: int, lr: float) -> Learned:
        """Train one adapter and judge it."""
        folder = self.out / f"{path}-{seed}"
        micro = batch_size // 2 if path == "regrouped" else batch_size
        flags = [
            *("--model.base", str(BASE), "--data.shards", str(self.shards), "--save.output", str(folder)),
            *("--train.steps", str(steps), "--train.batch_size", str(batch_size), "--train.seed", str(seed)),
            *("--train.micro_batch_size", str(micro), "--train.lr", str(lr), "--train.warmup_steps", "10"),
            *(
                "--lora.rank",
                "16",
                "--lora.alpha",
                "16",
                "--train.schedule",
                "cosine",
                "--save.every",
                str(steps),
            ),
        ]
        train(load_run([*flags, *PATHS[path]]), self.processes)
        events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
        losses = [event.value for event in events.Scalars("loss")]
        return Learned(path, seed, losses, self.error(folder / "adapter"))

    def error(self, adapter: Path) -> float:
        """Mean x0 error of the adapted model on the held-out pictures."""
        device = self.processes.device
        model = open_adapter(load_model(open_checkpoint(BASE), device, torch.float32), adapter)
        shards = Shards(self.held_out)
        total, patches = 0.0, 0
        for start in range(0, len(shards), AT_ONCE):
            indices = list(range(start, min(start + AT_ONCE, len(shards))))
            errors = [self._errors(model, shards, indices, sigma) for sigma in SIGMAS]
            total += sum(float(e.double().sum()) for e in errors)
            patches += sum(len(e) for e in errors)
        return total / patches

    def _errors(self, model: PeftModel, shards: Shards, indices: list[int], sigma: float) -> torch.Tensor:
        device = self.processes.device
        batch = pack([shards.read(i) for i in indices], indices, 1).to(device)
        levels = torch.full((len(indices),), sigma, device=device)
        z = noise_patches(
            batch.patches, levels, batch.patch_counts, indices, noise_scale=8.0, clip=None, dtype=torch.float32
        )  # fmt: skip
        with torch.no_grad():
            x_pred = model(batch.text.float(), z, 1 - levels, batch.layout)
        return patch_errors(x_pred, to_model(batch.patches))


def _prepared(folder: Path, pictures: int, seed: int) -> Path:
    write_style_set(folder / "images", pictures, pictures, seed)
    prepare(folder / "images", folder / "shards", BASE, options=Options(area=128))
    return folder / "shards"


def furthest(a: list[float], b: list[float], window: int = 10) -> float:
    """Largest relative difference of two loss curves, each averaged over `window` steps."""
    pairs = [
        (sum(a[i : i + window]) / window, sum(b[i : i + window]) / window)
        for i in range(0, min(len(a), len(b)) - window + 1, window)
    ]
    return max(abs(x - y) / y for x, y in pairs)
