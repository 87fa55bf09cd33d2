"""Recomputation of activations, applied to a plain decoder from outside."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from hdl.o1.decoder import O1


def recompute_every_layer(model: O1) -> None:
    """Keep only each decoder layer's input for backward and run the layer again there.

    The layer's `forward` is replaced on the instance, so names and parameters stay as they are.
    """
    for layer in model.model.language_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
