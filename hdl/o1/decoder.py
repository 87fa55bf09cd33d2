"""The O1 transformer: text and raw pixel patches in one sequence, the clean image out.

The decoder is that of Qwen3-VL; around it stand three small parts of O1's own: `x_embedder` turns a
noisy patch into a token, `t_embedder1` turns the time into the token that replaces <|tms_token|>, and
`final_layer2` reads the predicted clean patch off each patch token. Modules are named as in the
published checkpoint, so that weights load by name and PEFT's target names and adapters fit both.

What is not here on purpose: the token table (text arrives as embeddings), the language model's head
and the visual tower. Recomputation, sharding and quantization are applied to this file from outside.

Shapes: S tokens in the packed run, T of them text, P patches, R reference patches, V tokens of the text that the
visual tower made, B samples, D = hidden_size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdl.o1.attention import packed_attention
from hdl.o1.config import O1Config
from hdl.o1.layout import Layout
from hdl.o1.patches import PATCH_DIM

TIME_CHANNELS = 256
Rotary = tuple[Tensor, Tensor]  # cos and sin, each [S, head_dim]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(positions: Tensor, config: O1Config) -> Tensor:
    """Interleaved multimodal rotary angles, float32: positions int [3, S] -> [S, head_dim/2].

    Frequency i is theta^(-2i/head_dim). It turns with h for i = 1, 4, 7, ... below 3*section[1], with w
    for i = 2, 5, 8, ... below 3*section[2], and with t otherwise.
    """
    half = config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) * 2 / config.head_dim
    inverse = 1.0 / config.rope_theta**exponents
    t, h, w = positions.float()[:, :, None] * inverse  # each [S, half]
    angles = t.clone()
    for axis, offset in ((h, 1), (w, 2)):
        stop = 3 * config.mrope_section[offset]
        angles[:, offset:stop:3] = axis[:, offset:stop:3]
    return angles


def rotary(positions: Tensor, config: O1Config, dtype: torch.dtype) -> Rotary:
    """cos and sin of the angles, laid out for the rotate-half convention: each [S, head_dim]."""
    angles = rotary_angles(positions, config)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: Rotary) -> Tensor:
    """Turn x [S, heads, head_dim] by each token's angles."""
    cos, sin = (part[:, None] for part in turn)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = (
            n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)  # over each head
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor, turn: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """x [S, D] -> q [S, heads, head_dim], k and v [S, kv_heads, head_dim]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn), v

    def forward(self, x: Tensor, turn: Rotary, layout: Layout) -> Tensor:
        q, k, v = self.project(x, turn)
        return self.o_proj(packed_attention(q, k, v, layout).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: Rotary, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout, deepstack: Sequence[Tensor] = ()) -> Tensor:
        """deepstack: what is added to the tokens that the visual tower made after each of the first layers."""
        turn = rotary(layout.positions, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, layout)
            if i < len(deepstack):
                x = x.index_add(0, layout.seen_index, deepstack[i].to(x.dtype))
        return self.norm(x)


class PatchEmbedder(nn.Module):
    """3072 numbers -> hidden/4 -> hidden: a patch is seen through this bottleneck."""

    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.proj1 = nn.Linear(PATCH_DIM, config.hidden_size // 4, bias=False)
        self.proj2 = nn.Linear(config.hidden_size // 4, config.hidden_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj2(self.proj1(z))


class TimeEmbedder(nn.Module):
    """t in [0, 1] -> sinusoids of 1000*t, cosines first, longest period 10000 -> two linears."""

    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, config.hidden_size),
            nn.SiLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000.0) * steps / half)
        angles = 1000.0 * t.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class Head(nn.Module):
    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, PATCH_DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class References:
    """A run's reference images. patches [R, 3072]: clean, in [-1, 1]; deepstack: the visual tower's features
    [V, D] for each of the first decoder layers. (Its last features stand among the text embeddings.)"""

    patches: Tensor
    deepstack: Sequence[Tensor]


class O1Model(nn.Module):
    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.language_model = Decoder(config)
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder1 = TimeEmbedder(config)
        self.final_layer2 = Head(config)


class O1(nn.Module):
    """`model` is one level down, as in the published checkpoint: its names begin with `model.`."""

    def __init__(self, config: O1Config) -> None:
        super().__init__()
        self.config = config
        self.model = O1Model(config)

    def forward(
        self,
        text: Tensor,
        z: Tensor,
        t: Tensor,
        layout: Layout,
        measure: Callable[[Tensor, Head], Tensor] | None = None,
        references: References | None = None,
    ) -> Tensor:
        """Predict the clean patches of a packed run.

        text [T, D]: rows of the token table for every text token, sample by sample, in the model's dtype
        (what stands at <|tms_token|> is not read); z [P, 3072]: noisy patches; t [B]: 1 - sigma of each
        sample. Returns x_pred [P, 3072] in the model's dtype. Given `measure`, returns what it makes of the
        patches' hidden states [P, D] and the head in x_pred's place, which a loss then need not keep.
        """
        m = self.model
        time = m.t_embedder1(t)
        patches = z.to(time.dtype)
        if references is not None:
            patches = torch.cat([patches, references.patches.to(time.dtype)])
        x = torch.cat([text.to(time.dtype), time, m.x_embedder(patches)])[layout.order]
        x = m.language_model(x, layout, references.deepstack) if references else m.language_model(x, layout)
        hidden = x.index_select(0, layout.patch_index)
        return m.final_layer2(hidden) if measure is None else measure(hidden, m.final_layer2)
