"""The adapter as one flat parameter: one thing to train instead of hundreds.

PEFT's modules keep their parameters, as views of the flat one; what autograd, DeepSpeed and the optimizer
see is the flat parameter alone. The real model's adapter has 504 matrices: with the bookkeeping of each,
a step at one image would spend longer on the CPU than on the GPU. Files stay PEFT's: `by_name` and
`in_flat` translate between what is trained and the names in an adapter.
"""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

FLAT = "flat_adapter"


def flatten_adapter(model: PeftModel, parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """Make `parameters` views of a new flat parameter of the model, in this order."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    model.register_parameter(FLAT, flat)
    model.flat_places = [(name_of[id(p)], p.shape) for p in parameters]  # type: ignore[assignment]
    for p in parameters:
        p.requires_grad_(False)
    point_at_flat(model)
    return flat


def flat_parameter(model: nn.Module) -> nn.Parameter | None:
    return getattr(model, FLAT, None)


def point_at_flat(model: PeftModel) -> None:
    """Make PEFT's parameters views of the flat one again, after something moved or converted it."""
    flat = flat_parameter(model)
    assert flat is not None
    for name, part in _parts(model, flat.data):
        model.get_parameter(name).data = part


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer sees: the flat parameter, if there is one, and all that is not in it."""
    inside = {name for name, _ in getattr(model, "flat_places", [])}  # PEFT may mark these trainable again
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in inside}


def by_name(model: PeftModel, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of trained parameters -> tensors of PEFT's parameters, as in `adapter_parameters`."""
    named = {name: tensor for name, tensor in trained.items() if name != FLAT}
    if FLAT in trained:
        named |= dict(_parts(model, trained[FLAT]))
    return named


def in_flat(model: PeftModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `by_name`. KeyError when a name is missing."""
    if flat_parameter(model) is None:
        return named
    inside = [name for name, _ in model.flat_places]  # type: ignore[union-attr]
    rest = {name: tensor for name, tensor in named.items() if name not in set(inside)}
    return rest | {FLAT: torch.cat([named[name].flatten() for name in inside])}


def _parts(model: PeftModel, flat: Tensor) -> list[tuple[str, Tensor]]:
    parts, start = [], 0
    for name, shape in model.flat_places:  # type: ignore[union-attr]
        parts.append((name, flat[start : start + shape.numel()].view(shape)))
        start += shape.numel()
    return parts
