"""Which path a Studio's decoder takes, fused or plain: decided from its options before anything is loaded."""

from dataclasses import dataclass
from typing import Literal

import torch

from hdl.errors import HdlError
from hdl.kernels.fuse import streamed_bytes, supports_fp8
from hdl.memory.host import GIB, available
from hdl.o1.config import O1Config

Weights = Literal["full", "fp8", "nf4"]
Kernels = Literal["auto", "fused", "plain"]


@dataclass(frozen=True)
class PathOptions:
    """As a run's `model.*` options of the same names; fp8 is kept once, since nothing goes backward.

    weights: form of the decoder's frozen weights; stream: decoder layers that stay in host memory.
    """

    weights: Weights = "full"
    stream: int = 0
    kernels: Kernels = "auto"


@dataclass(frozen=True)
class DecoderPath:
    """fused: else plain. weights: the form that is packed. notices: what the user should know of it."""

    fused: bool
    weights: str
    notices: tuple[str, ...] = ()


def choose_path(
    options: PathOptions, config: O1Config, device: torch.device, dtype: torch.dtype, dora: bool = False
) -> DecoderPath:
    """dora: whether an adapter is one, which takes the plain path. HdlError for options that contradict one another, or that this device or host cannot follow."""
    weights, stream = options.weights, options.stream
    if not 0 <= stream <= config.num_hidden_layers:
        raise HdlError(
            f"stream {stream}: the model has {config.num_hidden_layers} layers; stream 0 to that many"
        )
    if weights == "nf4" and device.type != "cuda":
        raise HdlError("weights nf4 needs a CUDA GPU, and this is the CPU; use weights full or fp8")
    reason = _plain_because(options, device, dora)
    if reason:
        if options.kernels == "fused":
            raise HdlError(f"kernels fused: {reason}; use kernels auto")
        for option, found, without in (("weights", weights, "full"), ("stream", stream, 0)):
            if found != without:
                raise HdlError(
                    f"{option} {found} needs the fused path, but {reason}; use {option} {without}"
                    + ("" if dora else ", or kernels fused")
                )
        told = (f"plain kernels: {reason}",) if dora and options.kernels == "auto" else ()
        return DecoderPath(False, "full", told)
    notices: tuple[str, ...] = ()
    form: str = weights
    if weights == "fp8" and not supports_fp8(device):
        form = "fp8_stored"
        notices = (
            "this GPU has no fp8 arithmetic (Ada and newer do): e4m3 weights are only kept, not multiplied in",
        )
    _check_host(stream, form, config, dtype)
    return DecoderPath(True, form, notices)


def _plain_because(options: PathOptions, device: torch.device, dora: bool) -> str | None:
    if options.kernels == "plain":
        return "kernels is plain"
    if dora:
        return "an adapter is a DoRA, which needs each weight and its adapter as one matrix"
    if options.kernels == "auto" and device.type == "cpu" and options.weights == "full":
        return "a CPU gains nothing from it"
    return None


def _check_host(stream: int, weights: str, config: O1Config, dtype: torch.dtype) -> None:
    if not stream:
        return
    needed = stream * streamed_bytes(config, weights, dtype)
    found, where = available()
    if needed > found:
        raise HdlError(
            f"stream {stream} keeps {needed / GIB:.1f} GiB of weights in host memory, of which {found / GIB:.1f} GiB are "
            f"available ({where}); stream at most {int(stream * found / needed)} layers, or use a smaller form (weights)"
        )
