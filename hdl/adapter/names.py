"""How each format spells the tensors of an adapter of an O1, and which linears there are to adapt.

A module is named as in the published checkpoint, `model.language_model.layers.0.mlp.up_proj`. In the files:

    peft       base_model.model.<module>.lora_A.weight, .lora_B.weight; alpha in adapter_config.json; with DoRA
               .lora_magnitude_vector
    comfyui    diffusion_model.<module without model.>.lora_A.weight, .lora_B.weight, .alpha
    kohya      lora_unet_<module, dots as underscores>.lora_down.weight, .lora_up.weight, .alpha
    diffsynth  <module>.lora_A.default.weight, .lora_B.default.weight (read only)

Checked against the sources in November 2026:
- ComfyUI, comfy/lora.py: `model_lora_keys_unet` takes every `diffusion_model.<name>` of the model and its underscored
  `lora_unet_<name>`; its HiDreamO1Transformer (comfy/ldm/hidream_o1/model.py) has no `model.` level, and a branch of
  its own since PR 14767 takes `model.<name>`, which ModelScope's DiffSynth writes. comfy/weight_adapter/lora.py
  computes alpha / rows of the down matrix, and 1 where there is no alpha.
- musubi-tuner, networks/lora_hidream_o1.py: prefix `lora_unet` before the Qwen3-VL class's own module paths, hence
  `lora_unet_model_language_model_layers_0_mlp_up_proj`; besides the decoder it adapts the patch embedder and the
  head, with reference images also the visual tower.
- ai-toolkit writes `diffusion_model.model.<name>`, formerly without `model.`.
- diffusers had no released O1 class with adapters to go by.
So on reading, the first `model.` may be there or not, in any format, and down/up count as A/B.

An underscored name cannot be taken apart (`down_proj` has an underscore of its own): it is looked up among the names
of all linears that an O1 can have.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Literal

from hdl.o1.checkpoint import Checkpoint

Format = Literal["peft", "comfyui", "kohya", "diffsynth"]
Part = Literal["A", "B", "alpha", "magnitude"]

PREFIX: dict[Format, str] = {
    "peft": "base_model.model.",
    "comfyui": "diffusion_model.",
    "kohya": "lora_unet_",
    "diffsynth": "",
}
ENDINGS: dict[Format, dict[Part, str]] = {
    "peft": {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
    "comfyui": {"A": ".lora_A.weight", "B": ".lora_B.weight", "alpha": ".alpha"},
    "kohya": {"A": ".lora_down.weight", "B": ".lora_up.weight", "alpha": ".alpha"},
}  # as written
READ = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha)|lora_(magnitude)_vector)")
SAME: dict[str, Part] = {
    "A": "A",
    "down": "A",
    "B": "B",
    "up": "B",
    "alpha": "alpha",
    "magnitude": "magnitude",
}

DECODER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
AROUND = (
    "x_embedder.proj1",
    "x_embedder.proj2",
    "t_embedder1.mlp.0",
    "t_embedder1.mlp.2",
    "final_layer2.linear",
)
VISUAL_BLOCK = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
VISUAL_MERGER = ("linear_fc1", "linear_fc2")
MOST_LAYERS = 128  # more than any Qwen3-VL has


def key_of(module: str, part: Part, format: Format) -> str:
    """A tensor's name in a file. `format` is one that is written."""
    path = module.removeprefix("model.") if format == "comfyui" else module
    if format == "kohya":
        path = path.replace(".", "_")
    return f"{PREFIX[format]}{path}{ENDINGS[format][part]}"


def parse_key(key: str) -> tuple[Format, str, Part] | None:
    """Which format spells a tensor so, of which module and what; None when no O1 adapter has such a tensor."""
    match = READ.fullmatch(key)
    if not match:
        return None
    path, *parts = match.groups()
    part = SAME[next(found for found in parts if found)]
    format: Format = next(f for f, prefix in PREFIX.items() if path.startswith(prefix))
    path = path.removeprefix(PREFIX[format])
    if format == "kohya":
        module = _by_underscored().get(path.removeprefix("model_"), "")
    else:
        module = path if path.startswith("model.") else f"model.{path}"
    return (format, module, part) if module in _modules() else None


def linears(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Every linear of a checkpoint that an adapter may target: module -> (out, in)."""
    shapes = {name.removesuffix(".weight"): entry.shape for name, entry in checkpoint.entries.items()}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if name in _modules()}


def place(module: str) -> tuple[str, str]:
    """For tables: ("layer 3", "q_proj") of a decoder's linear; else what stands around the decoder and its linear."""
    layer = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.\w+\.(\w+)", module)
    if layer:
        return f"layer {layer[1]}", layer[2]
    around, _, linear = module.removeprefix("model.").partition(".")
    return around, linear


@cache
def _by_underscored() -> dict[str, str]:
    """Underscored name without the first `model.` -> module; no two modules share one (tested)."""
    return {name.removeprefix("model.").replace(".", "_"): name for name in _modules()}


@cache
def _modules() -> frozenset[str]:
    return frozenset(_names())


def _names() -> Iterator[str]:
    for layer in range(MOST_LAYERS):
        yield from (f"model.language_model.layers.{layer}.{linear}" for linear in DECODER)
        yield from (f"model.visual.blocks.{layer}.{linear}" for linear in VISUAL_BLOCK)
        yield from (f"model.visual.deepstack_merger_list.{layer}.{linear}" for linear in VISUAL_MERGER)
    yield from (f"model.{linear}" for linear in AROUND)
    yield from (f"model.visual.merger.{linear}" for linear in VISUAL_MERGER)
