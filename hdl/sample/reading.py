"""Text read once: what lets a picture's steps leave its prompt alone.

In O1 a text token attends to text alone, so its keys and values depend neither on the picture nor on the noise
or the time. They are computed once for a prompt and adapter; every step then computes the other tokens only,
which attend to the kept keys and values and to their own. Applied from outside to the plain decoder, whose modules,
adapters included, are run in another order, and to the fused one (hdl/kernels/steps.py).
"""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from hdl.kernels.fuse import fused_decoder
from hdl.kernels.steps import Reading
from hdl.o1.attention import attend
from hdl.o1.decoder import O1, Decoder, DecoderLayer, References, rotary
from hdl.o1.halves import halves, places_among
from hdl.o1.layout import AR, Layout

Predict = Callable[[Tensor, Tensor], Tensor]  # z [P, 3072] and t [B] -> x_pred [P, 3072]


def predictor(
    model: nn.Module, text: Tensor, layout: Layout, references: References | None = None, *, once: bool = True
) -> Predict:
    """The model on one packed run, without gradients, its text read once where its decoder is the plain or fused one.

    text [T, D], layout, references: as the model takes them. once: False reads the text in every step, as any other
    decoder does that somebody has put in its place.
    """
    o1 = _o1_of(model)
    if once and o1 is not None:
        fused = fused_decoder(o1)
        if fused:
            return _TextRead(o1, text, layout, references, lambda *of: Reading(fused, *of))
        if "forward" not in vars(o1.model.language_model):
            plain = o1.model.language_model
            return _TextRead(o1, text, layout, references, lambda *of: _PlainReading(plain, *of))
    more = {} if references is None else {"references": references}

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor) -> Tensor:
        return model(text, z, t, layout, **more)

    return predict


def _o1_of(model: nn.Module) -> O1 | None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner if isinstance(inner, O1) else None


class _Steps(Protocol):
    """A decoder on a run whose text it has read."""

    def step(self, x: Tensor) -> Tensor:
        """The GEN tokens through all layers and the last norm, [G, D] -> [G, D]."""


class _TextRead:
    """What stands around the decoder, in a run whose text was read: `__call__` is a Predict.

    read: makes the decoder's part of its AR tokens [n, D], the layout and deepstack."""

    @torch.no_grad()
    def __init__(
        self, o1: O1, text: Tensor, layout: Layout, references: References | None,
        read: Callable[[Tensor, Layout, Sequence[Tensor]], _Steps],
    ) -> None:  # fmt: skip
        self.model, self.references = o1.model, references
        ar, gen = halves(layout)
        self.order = layout.order[gen.index] - len(text)  # rows of [B time; P patch; R reference]
        self.patch_index = places_among(layout.token_types() != AR, layout.patch_index)
        dtype = o1.model.language_model.norm.weight.dtype
        self.decoder = read(
            text.to(dtype)[layout.order[ar.index]], layout, references.deepstack if references else ()
        )

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        m = self.model
        time = m.t_embedder1(t)
        patches = z.to(time.dtype)
        if self.references is not None:
            patches = torch.cat([patches, self.references.patches.to(time.dtype)])
        x = torch.cat([time, m.x_embedder(patches)])[self.order]
        return m.final_layer2(self.decoder.step(x)[self.patch_index])


class _PlainReading:
    """The plain decoder on a run whose text it has read."""

    def __init__(self, decoder: Decoder, text: Tensor, layout: Layout, deepstack: Sequence[Tensor]) -> None:
        self.norm, self.layers = decoder.norm, cast(list[DecoderLayer], list(decoder.layers))
        ar, self.gen = halves(layout)
        self.turn = rotary(layout.positions[:, self.gen.index], decoder.config, text.dtype)

        # By layer and group: keys and values [b, L - 1, kv_heads, head_dim] of the text.
        self.kept: list[list[tuple[Tensor, Tensor]]] = []
        turn = rotary(layout.positions[:, ar.index], decoder.config, text.dtype)
        seen = places_among(layout.token_types() == AR, layout.seen_index)
        x = text
        for i, layer in enumerate(self.layers):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), turn)
            self.kept.append([(k[group], v[group]) for group in ar.groups])
            if i == len(self.layers) - 1:
                break  # what the last layer makes of text nobody reads
            attended = torch.empty_like(q)
            for group, (keys, values) in zip(ar.groups, self.kept[-1]):
                attended[group] = attend(q[group], keys, values, causal=True)
            x = x + layer.self_attn.o_proj(attended.flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if i < len(deepstack):
                x = x.index_add(0, seen, deepstack[i].to(x.dtype))

    def step(self, x: Tensor) -> Tensor:
        for layer, kept in zip(self.layers, self.kept):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), self.turn)
            attended = torch.empty_like(q)
            for group, (keys, values) in zip(self.gen.groups, kept):
                keys, values = torch.cat([keys, k[group]], dim=1), torch.cat([values, v[group]], dim=1)
                attended[group] = attend(q[group], keys, values, causal=False)
            x = x + layer.self_attn.o_proj(attended.flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)
