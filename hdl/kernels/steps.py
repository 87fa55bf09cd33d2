"""Drawing over fused layers: the text is read once, then every step computes the other tokens alone.

`Reading` is a packed run whose text was read: it keeps the keys and values of its AR tokens, by layer, and its `step`
takes the GEN tokens through all layers. No autograd; nothing is kept for a backward pass.

On a GPU steps are replayed as a CUDA graph (`StepGraphs`): launching the some 700 kernels of one takes the CPU about as
long as a 1024x1024 picture takes the GPU. A graph depends on a `PictureFrame` alone: how many pictures of which sizes,
and how long their texts are, rounded up. Kept keys and values, positions and lengths are data, loaded when another
reading has its turn. The first step of a frame is a plain one, after which kernels are compiled and products have
raced; the second is captured. Adapters are brought into the packed weights before each step, outside of the graph.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hdl.kernels.attention import needs_exact_frame
from hdl.kernels.captures import Captures
from hdl.kernels.layer import Made, Run, forward_only
from hdl.kernels.picture_attention import OfLayer, PictureAttention, PictureFrame, TextAttention
from hdl.kernels.rms_norm import rms_norm
from hdl.o1.decoder import rotary_angles
from hdl.o1.halves import halves, places_among
from hdl.o1.layout import AR, Layout

if TYPE_CHECKING:
    from hdl.kernels.fuse import FusedDecoder

MAX_GRAPHS = 4  # frames; each has its inputs, and all together room for what a step computes


class Reading:
    """A run whose text was read, with the adapters as they were then. Without gradients."""

    @torch.no_grad()
    def __init__(
        self, fused: "FusedDecoder", text: Tensor, layout: Layout, deepstack: Sequence[Tensor] = ()
    ) -> None:
        """text [T, D]: embeddings of the AR tokens; layout, deepstack: as FusedDecoder.forward takes them."""
        self.fused = fused
        self.ar, self.gen = halves(layout)
        self.frame = PictureFrame.of(self.ar, self.gen, exact=needs_exact_frame(text.device, text.dtype))
        angles = rotary_angles(layout.positions, fused.config)
        self.cos, self.sin = angles[self.gen.index].cos(), angles[self.gen.index].sin()
        heads = fused.config.num_key_value_heads, fused.config.head_dim
        self.kept = text.new_zeros(len(fused.layers), 2, self.frame.text, *heads)
        seen = places_among(layout.token_types() == AR, layout.seen_index)
        fused.copies.refresh()
        fused.with_room(lambda: self._read(text, angles[self.ar.index], seen, deepstack))
        self._canvas: Canvas | None = None

    def _read(self, x: Tensor, angles: Tensor, seen: Tensor, deepstack: Sequence[Tensor]) -> None:
        attention: Any = TextAttention(self.ar, x.device, x.dtype)  # forward is all that is asked of it
        run = Run(self.fused.config, angles.cos(), angles.sin(), attention)
        self.fused.streaming.prepare("forward")
        for i, (layer, kept) in enumerate(zip(self.fused.layers, self.kept)):
            made = Made(layer, run, {"x": x})
            with layer.visit("forward only"):
                _, k = made.need("turned")
                kept[0, : len(x)], kept[1, : len(x)] = k, made.values()
                if i == len(self.kept) - 1:
                    continue  # what the last layer makes of text nobody reads
                x = forward_only(made)
            if i < len(deepstack):
                x = x.index_add(0, seen, deepstack[i].to(x.dtype))

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """GEN tokens x [G, D] through all layers and the last norm: [G, D], good until the next step of any reading."""
        fused = self.fused
        fused.copies.refresh()
        if fused.step_graphs:
            replayed = fused.step_graphs(self, x, capture=self._canvas is not None)
            if replayed is not None:
                return replayed
        if self._canvas is None:
            self._canvas = Canvas(self, self.kept)
        canvas = self._canvas
        return fused.with_room(lambda: canvas.step(fused, x.contiguous()))


class Canvas:
    """What a step reads besides x and the weights, in one place."""

    def __init__(self, reading: Reading, kept: Tensor) -> None:
        """Loaded with the reading. kept: its own, or memory for a copy."""
        config = reading.fused.config
        heads = config.num_key_value_heads, config.head_dim
        self.kept = kept
        self.attention = PictureAttention(reading.frame, heads, kept.device, kept.dtype)
        self.cos, self.sin = torch.empty_like(reading.cos), torch.empty_like(reading.sin)
        layers: list[Any] = [OfLayer(self.attention, kept) for kept in kept]
        self.runs = [Run(config, self.cos, self.sin, layer) for layer in layers]
        self.load(reading)

    def load(self, reading: Reading) -> None:
        """Another one of the same frame."""
        self.attention.load(reading.ar, reading.gen)
        self.cos.copy_(reading.cos)
        self.sin.copy_(reading.sin)
        if self.kept is not reading.kept:
            self.kept.copy_(reading.kept)

    def step(self, fused: "FusedDecoder", x: Tensor) -> Tensor:
        """As Reading.step, with the adapters' values as they were last brought in."""
        fused.streaming.prepare("forward")
        for layer, run in zip(fused.layers, self.runs):
            with layer.visit("forward only"):
                x = forward_only(Made(layer, run, {"x": x}))
        return rms_norm(x, fused.norm.weight, fused.norm.eps)[0]


class CapturedStep:
    """One frame's graph, and where it reads and writes."""

    def __init__(self, reading: Reading, x: Tensor, pool: Any) -> None:
        self.frame = reading.frame
        self.canvas = Canvas(reading, torch.empty_like(reading.kept))
        self._loaded = weakref.ref(reading)
        self.x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.graph = torch.cuda.CUDAGraph()
        # A thread that reads ahead may allocate during the capture.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.out = self.canvas.step(reading.fused, self.x)

    def replay(self, reading: Reading, x: Tensor) -> Tensor:
        if self._loaded() is not reading:
            self.canvas.load(reading)
            self._loaded = weakref.ref(reading)
        self.x.copy_(x)
        self.graph.replay()
        return self.out


class StepGraphs(Captures[CapturedStep]):
    """Stand in for a decoder's steps on a GPU, where all of its layers are resident.

    Streamed layers take longer to arrive than their kernels to be launched, and a model that is trained needs the
    memory that graphs hold between steps: neither has any.
    """

    def __init__(self) -> None:
        super().__init__(enabled=True)

    def __call__(self, reading: Reading, x: Tensor, capture: bool) -> Tensor | None:
        """As Reading.step, or None where it has to be a plain one. capture: whether a step like it was plain before."""
        captured = next((c for c in self.captured if c.frame == reading.frame), None)
        if captured:
            self.captured.remove(captured)
        elif capture and self._enabled:
            captured = self.with_room(lambda: CapturedStep(reading, x, self.pool()))
        if captured is None:
            return None
        self.captured = [*self.captured[-MAX_GRAPHS + 1 :], captured]
        return captured.replay(reading, x)
