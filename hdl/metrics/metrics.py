"""What a run's validation measures beside losses, and the names of its curves.

style/with, style/without, style/gate      scores of the pictures asked for with the trigger and without, and what lies
                                           between them: 1 - 0 is a look that comes when asked for, and only then
drift, change, drift/relative              how far predictions move (hdl/metrics/drift.py)
memorization/adapter, memorization/base    distance from the training pictures (hdl/metrics/memorization.py)
style/score                                what the best adapter is chosen by (hdl/metrics/best.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor

from hdl.config import Run
from hdl.data.mixture import Mixture
from hdl.data.untriggered import Untriggered
from hdl.engine.processes import Processes
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS
from hdl.metrics.best import Judged, judged
from hdl.metrics.drift import Drift
from hdl.metrics.memorization import nearest_distance, training_patches
from hdl.metrics.scores import Score, open_score
from hdl.o1.prompt import PromptEncoder
from hdl.sample.generate import Request


@dataclass(frozen=True)
class Report:
    """curves: values by name; judged: where there is a score to be the best by."""

    curves: dict[str, float] = field(default_factory=dict)
    judged: Judged | None = None


class Metrics:
    """Of a run. Opened before a weight is read, so that what is wrong with them is told then."""

    def __init__(
        self, run: Run, encoder: PromptEncoder | None, mixture: Mixture, processes: Processes
    ) -> None:
        """encoder: of the base, where the run has prompts. HdlError for a score that cannot be opened, and for prompts
        that leave nothing to compare."""
        self.settings, self.trigger, self.processes = run.validation, run.data.trigger, processes
        self.variant, self.mixture = VARIANTS[run.model.variant], mixture
        self.score: Score | None = None
        self.without: list[Request] = []
        self.with_trigger: list[Request] = []
        prompts, self.triggered = self.settings.prompts, [False] * len(self.settings.prompts)
        if self.trigger and encoder:
            untriggered = Untriggered(encoder, run.data.all_phrases, run.train.seed)
            self.triggered = [untriggered.asks(p) for p in prompts]
            if self.settings.drift:
                for i, prompt in enumerate(dict.fromkeys(untriggered.without(p) for p in prompts)):
                    self.without.append(self._request(encoder, prompt, i))
                    self.with_trigger.append(self._request(encoder, f"{self.trigger}, {prompt}", i))
        if self.settings.style:
            self._check_both()
            if processes.is_main:  # who has all pictures
                self.score = open_score(self.settings.style, self.settings.style_references, processes.device)
                blank = Image.new("RGB", (self.settings.width, self.settings.height))
                self.score(blank)  # what fails does so now
        self._patches: Tensor | None = None

    def report(
        self,
        model: PeftModel,
        step: int,
        base: Sequence[Tensor],
        adapted: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Report:
        """Every rank calls this; pictures and scores are rank 0's to look at, whose report counts. base, adapted:
        uint8 [H, W, 3] of every prompt, drawn without and with the adapter."""
        curves: dict[str, float] = {}
        relative = 0.0
        if self.without:
            drift = Drift(self.without, self.with_trigger, self.processes, self.variant, dtype)
            distances = drift.measure(model)
            curves, relative = distances.curves(), distances.relative
        if not self.processes.is_main:
            return Report(curves)
        if self.settings.memorization:
            curves |= self._memorization(base, adapted)
        if self.score is None:
            return Report(curves)
        scores = [self.score(Image.fromarray(picture.numpy())) for picture in adapted]
        by_kind = {kind: [s for s, t in zip(scores, self.triggered) if t is kind] for kind in (True, False)}
        asked, plain = (sum(values) / len(values) for values in (by_kind[True], by_kind[False]))
        best = judged(step, asked - plain, relative, self.settings.drift_weight)
        curves |= {
            "style/with": asked, "style/without": plain, "style/gate": best.gate, "style/score": best.score,
        }  # fmt: skip
        return Report(curves, best)

    def _memorization(self, base: Sequence[Tensor], adapted: Sequence[Tensor]) -> dict[str, float]:
        if self._patches is None:
            self._patches = training_patches(self.mixture)
        device = self.processes.device
        return {
            "memorization/adapter": nearest_distance(adapted, self._patches, device),
            "memorization/base": nearest_distance(base, self._patches, device),
        }

    def _request(self, encoder: PromptEncoder, prompt: str, i: int) -> Request:
        settings = self.settings
        text = encoder.embed(encoder.ids(prompt))
        return Request(text, settings.height, settings.width, settings.seed + i)

    def _check_both(self) -> None:
        if self.trigger is None:
            raise HdlError(
                "validation.style compares pictures with the trigger and without: set data.trigger"
            )
        if len(set(self.triggered)) < 2:
            lacking = "without" if all(self.triggered) else "with"
            raise HdlError(
                f"validation.style compares pictures with the trigger and without, and no prompt is {lacking} "
                f"{self.trigger!r}; give validation.prompts of both kinds"
            )
