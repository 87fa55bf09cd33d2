"""The model as DeepSpeed's ZeRO-3 has it, built tensor by tensor: no rank ever holds more of it than its shares and one
tensor.

The frozen weights are read one at a time, all ranks the same one, and DeepSpeed keeps this rank's part of each before the
next is read. The adapter comes later and is divided with the rest when the engine is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hdl.o1.checkpoint import Checkpoint
from hdl.o1.decoder import O1


def load_partitioned(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, settings: dict[str, Any]
) -> O1:
    """As hdl.o1.checkpoint.load_model, with every weight divided over the ranks, who all call it. settings:
    DeepSpeed's, as its engine will have them."""
    with torch.device("meta"):
        model = O1(checkpoint.config)
    deepspeed.init_distributed(dist_init_required=False)  # the process group that there is
    names = [name for name, _ in model.named_parameters()]
    partition = None
    for name, value in checkpoint.read_all(names, device, dtype):
        weight = nn.Parameter(value, requires_grad=False)
        del value  # or it would stay until the next one has been read
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, weight)
        if partition is None:  # DeepSpeed makes what divides from a module, and leaves it with its weights
            deepspeed.zero.Init(module=nn.ParameterList([weight]), config_dict_or_path=settings)
            partition = weight.convert_to_zero_parameters  # type: ignore[attr-defined]
        else:
            partition(param_list=[weight])
    return model.requires_grad_(False).eval()


@contextmanager
def gathered_for_peft(settings: dict[str, Any]) -> Iterator[None]:
    """While an adapter is attached: PEFT brings a divided weight together to look at it, as DoRA does for its norm, if
    transformers says that there is ZeRO-3, which it says as long as such an object lives."""
    says_so = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del says_so
        unset_hf_deepspeed_config()


def share_with_dora(adapted: PeftModel) -> None:
    """Have the weights that DoRA's layer reads there whenever it computes: it is a module beside those that own them."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name, dora in module.lora_magnitude_vector.items():
                deepspeed.zero.register_external_parameter(dora, module.get_base_layer().weight)
                deepspeed.zero.register_external_parameter(dora, module.lora_A[name].weight)
