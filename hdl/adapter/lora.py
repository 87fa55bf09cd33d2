"""LoRA on the decoder, through PEFT: attach, save, load.

The adapter's parameters and files are PEFT's own. Because modules are named as in the published
checkpoint, `adapter_model.safetensors` with `adapter_config.json` loads onto the published model.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hdl.adapter.formats import CONFIG_FILE, WEIGHTS_FILE, config_text
from hdl.adapter.metadata import sizes
from hdl.adapter.patterns import check_patterns
from hdl.config import Lora
from hdl.errors import HdlError
from hdl.o1.decoder import O1
from hdl.seeds import derive_seed, seeded
from hdl.tensor_files import write_tensors


def attach(model: O1, lora: Lora, base: str, seed: int) -> PeftModel:
    """Wrap a frozen model with a fresh adapter (its output is zero); only the adapter is trainable.

    base: recorded in the adapter as the model it belongs to. HdlError when no module matches `targets`,
    or when a pattern decides about none.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora.targets,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )
    try:
        with seeded(derive_seed(seed, "lora")):  # every rank starts from the same A
            adapted = get_peft_model(model, config)  # type: ignore[arg-type]  # any nn.Module will do
    except ValueError as error:
        raise HdlError(
            f"lora.targets {lora.targets!r} fits no linear of the model ({error}); names look like "
            "model.language_model.layers.0.self_attn.q_proj"
        ) from None
    config.base_model_name_or_path = base
    check_patterns(lora, (name.removeprefix("base_model.model.") for name, _ in _adapted_layers(adapted)))
    return adapted


def shape_of(lora: Lora) -> str:
    """What two adapters must have in common to be the same tensors."""
    patterns = f", rank_pattern {lora.rank_pattern}" if lora.rank_pattern else ""
    return f"{'DoRA ' if lora.dora else ''}rank {lora.rank}, targets {lora.targets}{patterns}"


def scale_of(lora: Lora) -> str:
    """What the same tensors are multiplied with: with another, what has been learnt comes to something else."""
    patterns = f", alpha_pattern {lora.alpha_pattern}" if lora.alpha_pattern else ""
    return f"alpha {lora.alpha:g}{', rslora' if lora.rslora else ''}{patterns}"


class Switch:
    """Puts an attached adapter out of action, again and again.

    PEFT's disable_adapter goes through all modules and freezes parameters, too, which takes 50 ms of the real model's.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def off(self) -> Iterator[PeftModel]:
        """The model, as its base is."""
        for layer in self._layers:
            layer._disable_adapters = (
                True  # what disable_adapters reads, and PEFT itself sets nothing else to read
            )
        try:
            yield self.model
        finally:
            for layer in self._layers:
                layer._disable_adapters = False


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """PEFT's parameters by module name: lora_A and lora_B, and with DoRA lora_magnitude_vector."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def save_adapter(
    model: PeftModel, weights: dict[str, Tensor], folder: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a PEFT adapter from full `weights` named as in `adapter_parameters`.

    metadata: what else the file is to say of itself, from hdl.adapter.metadata.describe; rank and alpha are added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {stored: weights[name] for name, stored in stored_names(model).items()}
    write_tensors(folder / WEIGHTS_FILE, named, {**(metadata or {}), **sizes_of(model)})
    (folder / CONFIG_FILE).write_text(adapter_config(model), encoding="utf-8")


def sizes_of(model: PeftModel) -> dict[str, str]:
    """What the adapter's file says of its form: rank and alpha, and whose tensors they are."""
    layers = [layer for _, layer in _adapted_layers(model)]
    return {
        **sizes((of.r["default"] for of in layers), (of.lora_alpha["default"] for of in layers)),
        "format": "pt",
    }


def stored_names(model: PeftModel) -> dict[str, str]:
    """Names of `adapter_parameters` -> PEFT's for them in a file."""
    parameters = adapter_parameters(model)
    name_of = {id(p): name for name, p in parameters.items()}
    in_file = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return {name_of[id(p)]: stored for stored, p in in_file.items()}


def adapter_config(model: PeftModel) -> str:
    """adapter_config.json, for a model to draw with."""
    config = _config_of(model)
    config.inference_mode, training = True, config.inference_mode
    text = config_text(config)
    config.inference_mode = training
    return text


def read_adapter(model: PeftModel, folder: Path, name: str = WEIGHTS_FILE) -> dict[str, Tensor]:
    """A saved adapter's weights, named as in `adapter_parameters` of a model of the same rank and targets. name: of
    the file in that folder.

    HdlError when names or shapes differ from the model's.
    """
    try:
        found = load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise HdlError(f"{folder / name}: not readable ({error})") from None
    parameters = adapter_parameters(model)
    name_of = {stored: name for name, stored in stored_names(model).items()}
    expected = {stored: _shape(parameters, name) for stored, name in name_of.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != _shape(found, n))
    if wrong:
        raise HdlError(
            f"{folder / name} is an adapter of another shape: {wrong[0]} is {_shape(found, wrong[0])}, "
            f"expected {expected.get(wrong[0])} ({len(wrong)} tensors differ); use the rank, rank_pattern, "
            "targets and dora it was made with"
        )
    return {name_of[stored]: weight for stored, weight in found.items()}


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Fill the attached adapter from a folder, in the dtype it has in the model."""
    weights = read_adapter(model, folder)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(weights[name])


def open_adapter(model: O1, folder: Path) -> PeftModel:
    """Attach a saved adapter to a model, as it was trained, ready to draw with."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise HdlError(f"{folder}: no readable {CONFIG_FILE} of a LoRA there ({error})") from None
    config.inference_mode = False  # PEFT would freeze it before it is filled
    config.base_model_name_or_path = None  # where it was trained; nothing is read from there
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    load_adapter(adapted.train(), folder)
    return adapted.requires_grad_(False).eval()


def _adapted_layers(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _config_of(model: PeftModel) -> LoraConfig:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return config


def _shape(tensors: dict[str, Tensor] | dict[str, nn.Parameter], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None
