"""Draw prompts with a checkpoint and trained adapters: what tools/sample.py does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hdl.adapter.formats import check_fits, read_adapter_file
from hdl.adapter.stack import attach_adapters, set_adapters
from hdl.errors import HdlError
from hdl.kernels.fuse import fuse_to_draw
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.patches import PATCH
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.o1.visual import VisualTower
from hdl.sample.generate import Request, SamplerSettings, generate, steps_of
from hdl.sample.path import PathOptions, choose_path
from hdl.sample.references import edit_request, read_reference


@dataclass(frozen=True)
class Wanted:
    """A picture to draw. adapters: the weights of those that are on; references: images to draw from."""

    prompt: str
    seed: int
    height: int
    width: int
    adapters: Mapping[str, float] = field(default_factory=dict)
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A picture, and what it was drawn from."""

    wanted: Wanted
    image: Image.Image

    @property
    def prompt(self) -> str:
        return self.wanted.prompt

    @property
    def seed(self) -> int:
        return self.wanted.seed


class Studio:
    """A model with adapters on it, switched from picture to picture: bfloat16 on a GPU, float32 on a CPU.

    adapters: name -> PEFT folder or .safetensors file of any format. options: the decoder's path. HdlError for
    everything wrong with the files, and for options that cannot be followed here.
    """

    def __init__(
        self,
        base: Path,
        device: torch.device | str,
        *,
        config_from: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
        options: PathOptions | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.checkpoint = open_checkpoint(base, config_from)
        read = {name: read_adapter_file(path) for name, path in (adapters or {}).items()}
        dora = any(adapter.dora for adapter in read.values())
        self.path = choose_path(
            options or PathOptions(), self.checkpoint.config, self.device, self.dtype, dora
        )
        # What the files do not say of themselves: for the user to know.
        checked = [check_fits(adapter, self.checkpoint, name) for name, adapter in read.items()]
        self.notices = [*self.path.notices, *(notice for notice in checked if notice)]
        self.encoder = PromptEncoder(self.checkpoint)
        self.empty = self._text(UNCONDITIONAL_PROMPT)
        # Weights that are packed are read one by one, straight into their form.
        model = load_model(self.checkpoint, self.device, self.dtype, absent=self.path.fused)
        self.adapted = attach_adapters(model, read) if read else None
        self.model = self.adapted or model
        if self.path.fused:
            stream = options.stream if options else 0
            fuse_to_draw(self.model, weights=self.path.weights, stream=stream)
        self._tower: VisualTower | None = None

    def draw(self, wanted: Sequence[Wanted], settings: SamplerSettings, together: int = 1) -> list[Drawing]:
        """Draw everything, up to `together` neighbours with the same adapters in one packed run.

        HdlError, before anything is drawn, for no prompts, sizes that are not multiples of 32, prompts that are too
        long and references that cannot be used.
        """
        if not wanted:
            raise HdlError("no prompts to draw")
        if together < 1:
            raise HdlError(f"together {together}: expected at least one picture in a run")
        requests = [self._request(one) for one in wanted]
        drawings: list[Drawing] = []
        with tqdm(total=len(wanted) * steps_of(settings), desc="drawing", unit="step", disable=None) as bar:
            for (adapters, _), run in groupby(zip(wanted, requests), key=_alike):
                if self.adapted:
                    set_adapters(self.adapted, dict(adapters))
                neighbours = list(run)
                for start in range(0, len(neighbours), together):
                    part = neighbours[start : start + together]
                    pictures = generate(
                        self.model, [request for _, request in part], self.empty, settings, self.device,
                        on_step=partial(bar.update, len(part)),
                    )  # fmt: skip
                    drawings += [Drawing(one, _image(p)) for (one, _), p in zip(part, pictures)]
        return drawings

    def _request(self, wanted: Wanted) -> Request:
        if min(wanted.height, wanted.width) < PATCH or wanted.height % PATCH or wanted.width % PATCH:
            raise HdlError(f"size {wanted.width}x{wanted.height}: expected positive multiples of {PATCH}")
        if not wanted.references:
            return Request(self._text(wanted.prompt), wanted.height, wanted.width, wanted.seed)
        images = [read_reference(path) for path in wanted.references]
        self._tower = self._tower or VisualTower(self.checkpoint, self.device, self.dtype)
        return edit_request(
            self._tower, self.encoder, wanted.prompt, images, wanted.height, wanted.width, wanted.seed
        )

    def _text(self, prompt: str) -> Tensor:
        return self.encoder.embed(self.encoder.ids(prompt))


def draw_prompts(
    base: Path,
    prompts: Sequence[str],
    settings: SamplerSettings,
    *,
    seeds: Sequence[int],
    adapter: Path | None = None,
    height: int,
    width: int,
    together: int,
    device: torch.device | str,
) -> list[Drawing]:
    """Draw each prompt once, from its own seed, with one adapter or none."""
    studio = Studio(base, device, adapters={"adapter": adapter} if adapter else {})
    on = {"adapter": 1.0} if adapter else {}
    wanted = [Wanted(prompt, seed, height, width, on) for prompt, seed in zip(prompts, seeds)]
    return studio.draw(wanted, settings, together)


def _alike(pair: tuple[Wanted, Request]) -> tuple[tuple[tuple[str, float], ...], bool]:
    """What pictures of one run have in common: adapters, and whether they are edits of one reference."""
    wanted, _ = pair
    return tuple(sorted(wanted.adapters.items())), len(wanted.references) == 1


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.numpy())
