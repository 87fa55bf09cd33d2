"""Text read once: what lets a picture's steps leave its prompt alone.

In O1 a text token attends to text alone, so its keys and values depend neither on the picture nor on the noise
or the time. They are computed once for a prompt and adapter; every step then computes the other tokens only,
which attend to the kept keys and values and to their own. Applied to the plain decoder from outside: the same
modules, adapters included, in another order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from hdl.o1.attention import attend
from hdl.o1.decoder import O1, Decoder, DecoderLayer, References, rotary
from hdl.o1.layout import AR, Layout

Predict = Callable[[Tensor, Tensor], Tensor]  # z [P, 3072] and t [B] -> x_pred [P, 3072]


def predictor(
    model: nn.Module, text: Tensor, layout: Layout, references: References | None = None, *, once: bool = True
) -> Predict:
    """The model on one packed run, without gradients, its text read once where its decoder is the plain one.

    text [T, D], layout, references: as the model takes them. once: False reads the text in every step, as a
    decoder does that somebody has replaced (hdl/kernels/fuse.py).
    """
    o1 = _o1_of(model)
    if once and o1 is not None and "forward" not in vars(o1.model.language_model):
        return _TextRead(o1, text, layout, references)
    more = {} if references is None else {"references": references}

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor) -> Tensor:
        return model(text, z, t, layout, **more)

    return predict


def _o1_of(model: nn.Module) -> O1 | None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner if isinstance(inner, O1) else None


@dataclass(frozen=True)
class _Half:
    """The AR tokens of a run, or the GEN tokens: n of its tokens, in its order. groups: for every group of the
    layout, where its b segments' tokens stand among the n: int64 [b, n / b]."""

    index: Tensor  # int64 [n]
    groups: list[Tensor]

    @classmethod
    def of(cls, layout: Layout, chosen: Tensor, parts: list[Tensor]) -> "_Half":
        place = chosen.cumsum(0) - 1
        return cls(chosen.nonzero().squeeze(1), [place[part] for part in parts])


class _TextRead:
    """A run whose text was read: `__call__` is a Predict."""

    @torch.no_grad()
    def __init__(self, o1: O1, text: Tensor, layout: Layout, references: References | None) -> None:
        self.model, self.references = o1.model, references
        decoder: Decoder = o1.model.language_model
        self.norm, self.layers = decoder.norm, cast(list[DecoderLayer], list(decoder.layers))
        is_ar = layout.token_types() == AR
        texts = [group.index[:, : group.text - 1] for group in layout.groups]
        others = [group.index[:, group.text - 1 :] for group in layout.groups]
        ar = _Half.of(layout, is_ar, texts)
        self.gen = _Half.of(layout, ~is_ar, others)
        self.order = layout.order[self.gen.index] - len(text)  # rows of [B time; P patch; R reference]
        self.patch_index = (is_ar.logical_not().cumsum(0) - 1)[layout.patch_index]
        dtype = decoder.norm.weight.dtype
        self.turn = rotary(layout.positions[:, self.gen.index], decoder.config, dtype)

        # By layer and group: keys and values [b, L - 1, kv_heads, head_dim] of the text.
        self.kept: list[list[tuple[Tensor, Tensor]]] = []
        turn = rotary(layout.positions[:, ar.index], decoder.config, dtype)
        x = text.to(dtype)[layout.order[ar.index]]
        seen_index = (is_ar.cumsum(0) - 1)[layout.seen_index]
        deepstack = references.deepstack if references else ()
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
                x = x.index_add(0, seen_index, deepstack[i].to(x.dtype))

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        m = self.model
        time = m.t_embedder1(t)
        patches = z.to(time.dtype)
        if self.references is not None:
            patches = torch.cat([patches, self.references.patches.to(time.dtype)])
        x = torch.cat([time, m.x_embedder(patches)])[self.order]
        for layer, kept in zip(self.layers, self.kept):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), self.turn)
            attended = torch.empty_like(q)
            for group, (keys, values) in zip(self.gen.groups, kept):
                keys, values = torch.cat([keys, k[group]], dim=1), torch.cat([values, v[group]], dim=1)
                attended[group] = attend(q[group], keys, values, causal=False)
            x = x + layer.self_attn.o_proj(attended.flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return m.final_layer2(self.norm(x)[self.patch_index])
