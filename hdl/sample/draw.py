"""Draw prompts with a checkpoint and, if wanted, a trained adapter: what tools/sample.py does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from hdl.adapter.lora import open_adapter
from hdl.errors import HdlError
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.patches import PATCH
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.sample.generate import Request, SamplerSettings, generate


@dataclass(frozen=True)
class Drawing:
    """A picture, and what it was drawn from."""

    prompt: str
    seed: int
    image: Image.Image


def draw_prompts(
    base: Path,
    prompts: Sequence[str],
    settings: SamplerSettings,
    *,
    seeds: Sequence[int],
    adapter: Path | None = None,
    config_from: Path | None = None,
    height: int,
    width: int,
    together: int,
    device: torch.device | str,
) -> list[Drawing]:
    """Draw each prompt once, from its own seed, `together` pictures in one packed run.

    adapter: folder of a PEFT adapter. The model runs in bfloat16 on a GPU, in float32 on a CPU. HdlError for
    sizes that are not multiples of 32 and for everything wrong with the files.
    """
    if height % PATCH or width % PATCH or height < PATCH or width < PATCH:
        raise HdlError(f"size {width}x{height}: expected positive multiples of {PATCH}")
    if not prompts:
        raise HdlError("no prompts to draw")
    checkpoint = open_checkpoint(base, config_from)
    encoder = PromptEncoder(checkpoint)
    texts = [encoder.embed(encoder.ids(prompt)) for prompt in (*prompts, UNCONDITIONAL_PROMPT)]
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    base_model = load_model(checkpoint, device, dtype)
    model = base_model if adapter is None else open_adapter(base_model, adapter)
    requests = [Request(text, height, width, seed) for text, seed in zip(texts, seeds)]
    pictures = []
    for start in tqdm(range(0, len(requests), together), desc="drawing", unit="pack"):
        pictures += generate(model, requests[start : start + together], texts[-1], settings, device)
    return [
        Drawing(prompt, request.seed, Image.fromarray(picture.numpy()))
        for prompt, request, picture in zip(prompts, requests, pictures)
    ]
