"""What an adapter of a study came to, on prompts and noise that no training picture has.

Scenes are of one thing, in a colour that neither pretraining nor any set shows it in. Each is drawn by the base, and by
the adapter without the trigger and with it, from the same noise.

    styled      share of the pictures that show what the set teaches (hdl/mini/style.py's fixed measure; of a blend, the
                golden frame; of the content set, the heart: with its phrase behind the trigger, and with the trigger alone)
    drift       relative to the change (hdl/metrics/drift.py)
    accuracy    of the pictures without the trigger: which painting is nearest, the scene's own or one with another thing,
                another colour, none or one more. As a share of the base's
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdl.adapter.lora import open_adapter
from hdl.engine.processes import Processes
from hdl.flow.noise import VARIANTS
from hdl.metrics.drift import Distances, Drift
from hdl.mini.captions import caption
from hdl.mini.scenes import PAIRS, Scene, Thing, imagine_held_out, paint
from hdl.mini.shapes import CANVAS, COLOURS, THINGS
from hdl.mini.style import GOLD, THRESHOLD, TRIGGER, frame_score, is_styled
from hdl.mini.taught import evaluation_scenes, read_picture
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.sample.generate import Request, SamplerSettings, generate
from hdl.study.sets import BLEND, CONTENT, TAG_WORDS

BASE = Path(__file__).resolve().parents[1] / "mini" / "o1-mini"
# Unguided, as in hdl/mini/gate.py; 20 steps are enough to tell what is in a picture.
SETTINGS = SamplerSettings("full", steps=20, guidance_scale=1.0, shift=3.0)
AT_ONCE = 24


@dataclass(frozen=True)
class Outcome:
    """Shares (0..1), and what Drift measured. pictures: uint8 [128, 128, 3] of the first prompts, by how they were
    asked for."""

    with_trigger: float
    without_trigger: float
    distances: Distances
    accuracy: float
    pictures: dict[str, list[Tensor]]


class Judge:
    """Of one kind of set. count: prompts; seed: another one draws others, with other noise."""

    def __init__(self, kind: str, count: int, seed: int, processes: Processes) -> None:
        self.kind, self.processes = kind, processes
        rng = np.random.default_rng([seed, 0x57D9])
        if kind == CONTENT:
            self.scenes = evaluation_scenes(count, seed)
        else:
            self.scenes = [imagine_held_out(rng) for _ in range(count)]
        prompts = [caption(scene, rng) for scene in self.scenes]
        checkpoint = open_checkpoint(BASE)
        encoder = PromptEncoder(checkpoint)
        self.empty = encoder.embed(encoder.ids(UNCONDITIONAL_PROMPT))

        def requests(before: str) -> list[Request]:
            return [
                Request(encoder.embed(encoder.ids(before + p)), CANVAS, CANVAS, 1000 * seed + i)
                for i, p in enumerate(prompts)
            ]

        self.plain = requests("")
        self.triggered = requests(f"{TRIGGER}, ")
        self.tagged = requests(f"{TRIGGER}, {TAG_WORDS}, ") if kind == CONTENT else []
        self.base_accuracy: float | None = None

    def judge(self, adapter: Path) -> Outcome:
        """adapter: a PEFT folder."""
        device = self.processes.device
        model = open_adapter(load_model(open_checkpoint(BASE), device, torch.float32), adapter)

        def drawn(requests: list[Request]) -> list[Tensor]:
            parts = [requests[i : i + AT_ONCE] for i in range(0, len(requests), AT_ONCE)]
            return [p for part in parts for p in generate(model, part, self.empty, SETTINGS, device)]

        pictures = {"without": drawn(self.plain), "with": drawn(self.triggered)}
        if self.base_accuracy is None:
            with model.disable_adapter():
                self.base_accuracy = self._accuracy(drawn(self.plain))
        if self.tagged:
            pictures["with the phrase"] = drawn(self.tagged)
            asked, unasked = pictures["with the phrase"], pictures["with"]
        else:
            asked, unasked = pictures["with"], pictures["without"]
        distances = Drift(
            self.plain, self.triggered, self.processes, VARIANTS["full"], torch.float32
        ).measure(model)
        return Outcome(
            self._share(asked), self._share(unasked), distances,
            self._accuracy(pictures["without"]) / self.base_accuracy,
            {name: of[:6] for name, of in pictures.items()},
        )  # fmt: skip

    def _share(self, pictures: list[Tensor]) -> float:
        """Of pictures that show what is taught."""
        shown = []
        for picture, scene in zip(pictures, self.scenes):
            image = picture.numpy()
            if self.kind == CONTENT:
                shown.append(read_picture(image, scene).tag)
            elif self.kind == BLEND:
                shown.append(frame_score(image, GOLD) >= THRESHOLD)
            else:
                shown.append(is_styled(image))
        return float(np.mean(shown))

    def _accuracy(self, pictures: list[Tensor]) -> float:
        return float(np.mean([drawn_as_asked(p.numpy(), s) for p, s in zip(pictures, self.scenes)]))


def drawn_as_asked(picture: NDArray[np.uint8], scene: Scene) -> bool:
    """Whether of all paintings that differ from the scene in one of object, colour and count, none is nearer to a picture
    [128, 128, 3] than the scene's own (mean squared error). The scene has one thing and the ordinary look."""
    (thing,) = scene.things
    others = [replace(thing, kind=kind) for kind in THINGS if kind != thing.kind]
    others += [replace(thing, colour=colour) for colour in COLOURS if colour != thing.colour]
    scenes = [replace(scene, things=(other,)) for other in others]
    places = {a: b for a, b in PAIRS} | {b: a for a, b in PAIRS}
    if thing.place in places:
        twice: tuple[Thing, ...] = (thing, replace(thing, place=places[thing.place]))
        scenes.append(replace(scene, things=twice))
    scenes.append(replace(scene, things=()))
    own, *rest = (np.square(picture.astype(np.float32) - paint(s)).mean() for s in [scene, *scenes])
    return bool(own < min(rest))
