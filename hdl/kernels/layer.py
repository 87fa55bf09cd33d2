"""One decoder layer on the fast path, forward and backward in one autograd function.

What the layer computes is hdl.o1.decoder.DecoderLayer's; here it is cut into stages that each make one
thing from things made before,

    x -> qkv_in -> qkv -> turned -> o_in -> x1 -> gate_up_in -> gate_up -> down_in -> out

where every `_in` is a normed or gated activation in the buffer that the next product reads, and `turned`
is q and k after their norms and rotary. Backward needs most of them again. Which are kept and which are
made anew is a set of names (`KEPT`); whatever is missing is made by the stage that made it first, from
the nearest thing that was kept, so that a level of recomputation is one line here.

Gradients of the residual stream pass from layer to layer in the buffer that the layer below reads
(`Shared`), so they are neither copied nor quantized in a pass of their own.

S tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hdl.kernels.attention import Frame, RunAttention, run_attention
from hdl.kernels.head_norm_rotary import head_norm_rotary, head_norm_rotary_backward
from hdl.kernels.linears import Buffer, PackedLinear
from hdl.kernels.quantize import quantize_rows
from hdl.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from hdl.kernels.swiglu import swiglu, swiglu_backward
from hdl.memory.offload import InPlace, Keeper, size_of
from hdl.memory.streaming import Way, resident
from hdl.o1.config import O1Config
from hdl.o1.decoder import DecoderLayer, RMSNorm, rotary_angles
from hdl.o1.layout import Layout

# What backward finds ready besides the layer's input x, by level; each level keeps less than the one before.
KEPT: dict[str, frozenset[str]] = {
    "everything": frozenset({"qkv_in", "qkv", "turned", "o_in", "x1", "gate_up_in", "gate_up", "down_in"}),
    "products": frozenset({"qkv", "o_in", "x1", "gate_up"}),  # norms, rotary and SwiGLU are made anew
    "attention": frozenset({"o_in", "x1"}),  # the products of qkv and gate_up too
    "input": frozenset(),
}


@dataclass(frozen=True)
class Run:
    """What all layers share in one forward pass: rotary cos and sin, float32 [frame.tokens, d/2], and
    attention."""

    config: O1Config
    cos: Tensor
    sin: Tensor
    attention: RunAttention

    @classmethod
    def of(cls, frame: Frame, layout: Layout, config: O1Config, like: Tensor) -> "Run":
        """like: of the hidden states' device and dtype."""
        cos, sin = like.new_zeros(2, frame.tokens, config.head_dim // 2, dtype=torch.float32)
        run = cls(config, cos, sin, run_attention(frame, layout, like.device, like.dtype))
        run._turn(layout)
        return run

    def load(self, layout: Layout) -> None:
        """Be the run of another layout that fits the frame, in the same memory."""
        self.attention.load(layout)
        self._turn(layout)

    def _turn(self, layout: Layout) -> None:
        angles = rotary_angles(layout.positions, self.config)
        torch.cos(angles, out=self.cos[: len(angles)])
        torch.sin(angles, out=self.sin[: len(angles)])


class Shared:
    """What the layers of a decoder share in one backward pass, from the last layer to the first."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat  # the adapter's flat parameter; each layer's part follows the one before
        self.leaf = flat  # whose gradient is asked for: `flat`, or what stands in for it in a capture
        self.input_learns = False  # whether something before the first layer is trained too
        self._gradient: Tensor | None = None
        self._scratch: Tensor | None = None
        self._handed: Buffer | None = None

    @property
    def gradient(self) -> Tensor:
        """Gradient of the flat parameter, filled part by part."""
        if self._gradient is None:
            self._gradient = torch.empty_like(self.flat)
        return self._gradient

    def use_gradient(self, buffer: Tensor) -> None:
        """Let the next backward pass write its gradient there."""
        self._gradient = buffer

    def scratch_gradient(self) -> Tensor:
        """Room for a gradient, always the same: what a captured backward pass writes to."""
        if self._scratch is None:
            self._scratch = torch.empty_like(self.flat)
        return self._scratch

    def take_gradient(self) -> Tensor:
        gradient, self._gradient = self.gradient, None
        return gradient

    def hand_down(self, buffer: Buffer) -> Tensor:
        """Leave the gradient of the residual stream where the layer below will read it."""
        self._handed = buffer
        return buffer.values

    def forget(self) -> None:
        """Start over with nothing handed down and no gradient begun."""
        self._gradient = self._handed = None

    def handed(self, gradient: Tensor) -> Buffer | None:
        """The buffer the layer above has left, if `gradient` is what it holds."""
        buffer, self._handed = self._handed, None
        if buffer is None or buffer.values.data_ptr() != gradient.data_ptr():
            return None
        return buffer if buffer.values.stride() == gradient.stride() else None


class Entrance(torch.autograd.Function):
    """Stands before the first layer: its backward comes last and delivers the flat parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, shared: Shared) -> Tensor:
        ctx.shared = shared
        shared.input_learns = ctx.needs_input_grad[0]
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        return dx, ctx.shared.take_gradient(), None


def packs(layer: DecoderLayer) -> list[list[nn.Module]]:
    """The layer's linears, those that share their input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


class FusedLayer:
    """A decoder layer's weights as the fast path reads them. `below`: the layer before it."""

    def __init__(
        self,
        layer: DecoderLayer,
        config: O1Config,
        packed: Callable[[list[nn.Module]], PackedLinear],
        keep: str,
        below: "FusedLayer | None",
        shared: Shared,
    ) -> None:
        attention = layer.self_attn
        self.norm1, self.norm2 = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.linears = [packed(modules) for modules in packs(layer)]
        self.qkv, self.o, self.gate_up, self.down = self.linears
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.keep = keep
        self.below, self.shared = below, shared
        self.starts: dict[PackedLinear, int] = {}  # of each linear's part of the flat adapter
        # Surrounds whatever reads the linears' weights.
        self.visit: Callable[[Way], AbstractContextManager[None]] = resident
        self.keeper: Keeper = InPlace()  # of what backward finds ready

    def lay_out_adapter(self, start: int) -> int:
        """Place this layer's part of the flat adapter at `start`; returns where it ends."""
        for linear in self.linears:
            self.starts[linear] = start
            start += sum(p.numel() for p in linear.parameters())
        return start

    def adapter_gradients(self, linear: PackedLinear, x: Buffer, dy: Buffer) -> None:
        linear.adapter_gradients(x, dy, self.shared.gradient[self.starts[linear] :])

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        return _Layer.apply(x, self, run)  # type: ignore[no-any-return,no-untyped-call]


class Made:
    """The things made so far of one layer's forward pass; `need` makes those that are missing."""

    def __init__(self, layer: FusedLayer, run: Run, things: dict[str, Any]) -> None:
        self.layer, self.run = layer, run
        self.things = things

    def need(self, name: str) -> Any:
        if name not in self.things:
            getattr(self, f"_make_{name}")()
        return self.things[name]

    def drop(self, name: str) -> None:
        self.things.pop(name, None)

    def kept(self, names: frozenset[str]) -> dict[str, Any]:
        """x and the named things, with the small things that come with them."""
        wanted = {name + suffix for name in {"x", *names} for suffix in ("", ".rstd", ".saved")}
        return {n: thing for n, thing in self.things.items() if n in wanted}

    def values(self) -> Tensor:
        """v, [S, kv_heads, d], where it stands in qkv."""
        layer = self.layer
        return self.need("qkv")[:, -layer.kv_heads * layer.head_dim :].unflatten(-1, (-1, layer.head_dim))

    def _product(self, linear: PackedLinear, name: str, plus: Tensor | None = None) -> Tensor:
        """Of a linear and the buffer of this name, whose e4m3 copy is let go: nobody reads it again."""
        out = linear.forward(self.need(name), plus=plus)
        self.things[name] = _without_rows(self.things[name])
        return out

    def _make_qkv_in(self) -> None:
        layer, x = self.layer, self.things["x"]
        buffer = layer.qkv.input_buffer(len(x))
        _, rstd = rms_norm(x, layer.norm1.weight, layer.norm1.eps, out=buffer.values, quantized=buffer.rows)
        layer.qkv.lower_input(buffer)
        self.things["qkv_in"], self.things["x.rstd"] = buffer, rstd

    def _make_qkv(self) -> None:
        self.things["qkv"] = self._product(self.layer.qkv, "qkv_in")

    def _make_turned(self) -> None:
        layer = self.layer
        self.things["turned"] = head_norm_rotary(
            self.need("qkv"), self.run.cos, self.run.sin, layer.q_norm.weight, layer.k_norm.weight,
            layer.q_norm.eps, layer.heads, layer.kv_heads,
        )  # fmt: skip

    def _make_o_in(self) -> None:
        layer = self.layer
        q, k = self.need("turned")
        buffer = layer.o.input_buffer(len(q))
        saved = self.run.attention.forward(q, k, self.values(), buffer.values)
        if buffer.rows is not None:
            quantize_rows(buffer.values, into=buffer.rows)
        layer.o.lower_input(buffer)
        self.things["o_in"], self.things["o_in.saved"] = buffer, saved

    def _make_x1(self) -> None:
        self._make_gate_up_in()

    def _make_gate_up_in(self) -> None:
        layer = self.layer
        buffer = layer.gate_up.input_buffer(len(self.things["x"]))
        norm = layer.norm2
        settings: dict[str, Any] = {"out": buffer.values, "quantized": buffer.rows}
        if "x1" in self.things:
            _, rstd = rms_norm(self.things["x1"], norm.weight, norm.eps, **settings)
        else:
            branch = self._product(layer.o, "o_in")
            self.things["x1"], _, rstd = add_rms_norm(
                self.things["x"], branch, norm.weight, norm.eps, **settings
            )
        layer.gate_up.lower_input(buffer)
        self.things["gate_up_in"], self.things["x1.rstd"] = buffer, rstd

    def _make_gate_up(self) -> None:
        self.things["gate_up"] = self._product(self.layer.gate_up, "gate_up_in")

    def _make_down_in(self) -> None:
        gate_up = self.need("gate_up")
        buffer = self.layer.down.input_buffer(len(gate_up))
        swiglu(gate_up, out=buffer.values, quantized=buffer.rows)
        self.layer.down.lower_input(buffer)
        self.things["down_in"] = buffer

    def _make_out(self) -> None:
        self.need("x1")
        self.things["out"] = self._product(self.layer.down, "down_in", plus=self.things["x1"])


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FusedLayer, run: Run) -> Tensor:
        made = Made(layer, run, {"x": x.contiguous()})
        if not ctx.needs_input_grad[0]:
            with layer.visit("forward only"):
                return forward_only(made)
        layer.keeper.make_room()
        with layer.visit("forward"):
            out = made.need("out")
        ctx.layer, ctx.run = layer, run
        ctx.kept = layer.keeper.put(made.kept(KEPT[layer.keep]))
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        layer: FusedLayer = ctx.layer
        kept, ctx.kept = ctx.kept, None  # freed piece by piece, not at the end of the whole backward pass
        made = Made(layer, ctx.run, kept.take())
        with layer.visit("backward"):
            dx = backward(made, dout)
        del made  # what is left of it makes room for what comes next
        kept.done()
        return dx, None, None


def forward_only(made: Made) -> Tensor:
    """out, of which nothing is kept: what is read for the last time is let go at once."""
    for thing, read in (
        ("qkv", ("qkv_in",)),
        ("o_in", ("qkv", "turned")),
        ("gate_up_in", ("o_in", "x")),
        ("gate_up", ("gate_up_in",)),
        ("down_in", ("gate_up",)),
    ):
        made.need(thing)
        for name in read:
            made.drop(name)
    return made.need("out")  # type: ignore[no-any-return]


def backward(made: Made, dout: Tensor) -> Tensor | None:
    """Gradient of x (None where nothing before it learns); the adapter's goes to `Shared`."""
    layer, run = made.layer, made.run
    tokens = len(dout)
    gate_up, x1 = made.need("gate_up"), made.need("x1")

    d_down = layer.shared.handed(dout) or _buffered(dout, layer.down)
    layer.down.lower_gradient(d_down)
    d_hidden = layer.down.backward(d_down)
    d_gate_up = layer.gate_up.gradient_buffer(tokens)
    scale = layer.gate_up.gradient_scale
    settings: dict[str, Any] = {"out": d_gate_up.values, "quantized": d_gate_up.rows, "column_scale": scale}
    if "down_in" in made.things:
        swiglu_backward(d_hidden, gate_up, **settings)
    else:  # remade in the same pass
        down_in = _without_rows(layer.down.input_buffer(tokens))
        swiglu_backward(d_hidden, gate_up, h=down_in.values, **settings)
        layer.down.lower_input(down_in)
        made.things["down_in"] = down_in
    del d_hidden, gate_up
    layer.adapter_gradients(layer.down, made.need("down_in"), d_down)
    made.drop("down_in")
    made.drop("gate_up")

    layer.gate_up.lower_gradient(d_gate_up)
    layer.adapter_gradients(layer.gate_up, made.need("gate_up_in"), d_gate_up)
    made.drop("gate_up_in")
    d_normed = layer.gate_up.backward(d_gate_up)
    del d_gate_up, settings
    d_o = layer.o.gradient_buffer(tokens)
    rms_norm_backward(
        d_normed, x1, made.things["x1.rstd"], layer.norm2.weight, dresidual=d_down.values,
        out=d_o.values, quantized=d_o.rows, column_scale=layer.o.gradient_scale,
    )  # fmt: skip
    del d_normed, d_down, x1
    made.drop("x1")

    layer.o.lower_gradient(d_o)
    o_in = made.need("o_in")
    layer.adapter_gradients(layer.o, o_in, d_o)
    d_attended = layer.o.backward(d_o)
    q, k = made.need("turned")
    dq, dk, dv = run.attention.backward(
        d_attended, q, k, made.values(), o_in.values, made.things["o_in.saved"]
    )
    del d_attended, q, k, o_in
    made.drop("turned")
    made.drop("o_in")

    d_qkv = layer.qkv.gradient_buffer(tokens)
    head_norm_rotary_backward(
        dq, dk, dv, made.need("qkv"), run.cos, run.sin, layer.q_norm.weight, layer.k_norm.weight,
        layer.q_norm.eps, out=d_qkv.values, quantized=d_qkv.rows, column_scale=layer.qkv.gradient_scale,
    )  # fmt: skip
    del dq, dk, dv
    made.drop("qkv")
    layer.qkv.lower_gradient(d_qkv)
    layer.adapter_gradients(layer.qkv, made.need("qkv_in"), d_qkv)
    if layer.below is None and not layer.shared.input_learns:
        return None
    d_normed = layer.qkv.backward(d_qkv)
    return _residual_gradient(made, d_normed, d_o.values)


def rehearse(layers: Sequence[FusedLayer], norm: RMSNorm, run: Run, like: Tensor) -> list[int]:
    """Run one layer of every kind, forward and backward, and the last norm, on random numbers.

    Whatever is done once for a size (compiling kernels, choosing among products, cuDNN's plans) is done by
    then. like: of the hidden states' width, device and dtype. Returns the bytes that each layer keeps.
    """
    generator = torch.Generator(like.device)  # nobody else's numbers may change by this
    x, d_out = like.new_empty(2, len(run.cos), like.shape[1]).normal_(generator=generator)
    kinds = {_kind(layer): layer for layer in layers}
    sizes: dict[Any, int] = {}
    for kind, layer in kinds.items():
        layer.shared.use_gradient(layer.shared.scratch_gradient())
        made = Made(layer, run, {"x": x})
        with layer.visit("alone"):
            out = made.need("out")
            kept = made.kept(KEPT[layer.keep])
            sizes[kind] = size_of(kept)
            backward(Made(layer, run, kept), d_out)
        layer.shared.forget()
    normed, rstd = rms_norm(out, norm.weight, norm.eps)
    rms_norm_backward(normed, out, rstd, norm.weight)
    return [sizes[_kind(layer)] for layer in layers]


def _kind(layer: FusedLayer) -> tuple[Any, ...]:
    """The same for layers that launch the same kernels and keep things of the same sizes."""
    ranks = tuple(linear.r for linear in layer.linears)
    return layer.keep, type(layer.down), layer.below and type(layer.below.down), ranks


def _residual_gradient(made: Made, d_normed: Tensor, d_residual: Tensor) -> Tensor:
    """Gradient of the layer's input, written where the layer below will read it."""
    layer, x = made.layer, made.things["x"]
    arguments = (d_normed, x, made.things["x.rstd"], layer.norm1.weight)
    if layer.below is None:
        return rms_norm_backward(*arguments, dresidual=d_residual)
    reader = layer.below.down
    buffer = reader.gradient_buffer(len(x))
    rms_norm_backward(
        *arguments, dresidual=d_residual,
        out=buffer.values, quantized=buffer.rows, column_scale=reader.gradient_scale,
    )  # fmt: skip
    return layer.shared.hand_down(buffer)


def _without_rows(thing: Any) -> Any:
    """Backward reads an activation for the adapter's gradients alone, in bfloat16."""
    return replace(thing, wide_rows=None) if isinstance(thing, Buffer) else thing


def _buffered(gradient: Tensor, linear: PackedLinear) -> Buffer:
    """A gradient that came from elsewhere (the last layer's), copied into a buffer of `linear`."""
    buffer = linear.gradient_buffer(len(gradient))
    buffer.values.copy_(gradient)
    if buffer.rows is not None:
        quantize_rows(buffer.values, column_scale=linear.gradient_scale, into=buffer.rows)
    return buffer
