"""Several adapters on one model, each with a weight, switched without touching the model.

They are PEFT's adapters side by side: every adapted linear computes W x + sum_i weight_i scale_i B_i A_i x over those
that are on. Switching sets a few numbers and reads no weights, so it may be done for every prompt.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from hdl.adapter.formats import MOST_NAMED, Adapter, peft_config
from hdl.errors import HdlError
from hdl.o1.decoder import O1


@dataclass(frozen=True)
class Weighted:
    """An adapter as a command line names it."""

    path: Path
    weight: float


def parse_weighted(text: str) -> Weighted:
    """`PATH` or `PATH:WEIGHT`, the weight after the last colon; a path that exists as it stands is taken whole.

    HdlError for a weight that is not finite or is zero: what is not wanted is left out.
    """
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon and path and not Path(text).exists() else None
    except ValueError:
        weight = None
    if weight is None:
        return Weighted(Path(text), 1.0)
    check_weight(text, weight)
    return Weighted(Path(path), weight)


def check_weight(name: str, weight: float) -> None:
    if not math.isfinite(weight) or weight == 0:
        raise HdlError(
            f"{name}: weight {weight:g}, expected a finite number other than 0; leave out what is not wanted"
        )


def short_names(paths: Iterable[Path]) -> list[str]:
    """A name for each, unique and fit for PEFT: letters, digits and - alone.

    It is the file's or folder's own, a run's `adapter` folder called after the run; where two would be alike, those
    of the folders above are put before it, and last a number after it.
    """
    parts = [_own_parts(path) for path in paths]
    deep = [1] * len(parts)
    names = [_joined(own, 1) for own in parts]
    while alike := [i for i, name in enumerate(names) if names.count(name) > 1 and deep[i] < len(parts[i])]:
        for i in alike:
            deep[i] += 1
        names = [_joined(own, depth) for own, depth in zip(parts, deep)]
    return [f"{n}-{names[:i].count(n) + 1}" if n in names[:i] else n for i, n in enumerate(names)]


def _own_parts(path: Path) -> list[str]:
    parts = [part for part in path.parts if part not in (path.anchor, "..")]
    if len(parts) > 1 and parts[-1] == "adapter":
        parts.pop()
    return parts or ["adapter"]


def _joined(parts: list[str], depth: int) -> str:
    name = "-".join(parts[-depth:]).removesuffix(".safetensors")
    return "".join(c if c.isalnum() else "-" for c in name)


def attach_adapters(model: O1, adapters: Mapping[str, Adapter]) -> PeftModel:
    """Put adapters on a model, named as in `adapters`, all switched off: see `set_adapters`.

    The model must not have adapters yet. HdlError when one adapts a linear that the model does not have.
    """
    modules = dict(model.named_modules())
    adapted: PeftModel | None = None
    for name, adapter in adapters.items():
        lacking = [module for module in adapter.pairs if module not in modules]
        if lacking:
            raise HdlError(
                f"adapter {name} adapts {', '.join(lacking[:MOST_NAMED])} ({len(lacking)} in all), which this model does "
                "not have: the visual tower is not part of it"
            )
        config = peft_config(adapter)
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            adapted.add_adapter(name, config)
        with torch.no_grad():
            for module, pair in adapter.pairs.items():
                layer = adapted.get_submodule(f"base_model.model.{module}")
                assert isinstance(layer, LoraLayer)
                layer.lora_A.get_parameter(f"{name}.weight").copy_(pair.a)
                layer.lora_B.get_parameter(f"{name}.weight").copy_(pair.b)
                if pair.magnitude is not None:
                    layer.lora_magnitude_vector.get_parameter(f"{name}.weight").copy_(pair.magnitude)
    if adapted is None:
        raise HdlError("no adapters to attach")
    set_adapters(adapted, {})
    return adapted.requires_grad_(False).eval()


def set_adapters(model: PeftModel, weights: Mapping[str, float]) -> None:
    """Switch on the adapters named, with these weights, and no others; none: the model as it was without any.

    HdlError for a name that is not attached, for weights that are zero or not finite, and for a DoRA beside others: it
    sets the norms of a weight's rows, and what two make of them would depend on their order.
    """
    unknown = [name for name in weights if name not in model.peft_config]
    if unknown:
        raise HdlError(f"no adapter {', '.join(unknown)} here; attached are {', '.join(model.peft_config)}")
    for name, weight in weights.items():
        check_weight(name, weight)
        if len(weights) > 1 and getattr(model.peft_config[name], "use_dora", False):
            raise HdlError(
                f"adapter {name} is a DoRA, which is on alone or not at all; found {', '.join(weights)}"
            )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.set_adapter(list(weights) or list(model.peft_config), inference_mode=True)
        layer.enable_adapters(bool(weights))
        for name, weight in weights.items():
            layer.set_scale(name, weight)  # of the adapters it does not have, a layer knows nothing
    model.requires_grad_(False)
