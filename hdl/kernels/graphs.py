"""Training passes replayed as CUDA graphs, so that the GPU never waits for the CPU to launch kernels.

The decoder's forward and backward are some 2,500 launches. For one 1024x1024 image the GPU needs 60 ms for
them, the CPU 100 to 200; with fp8 arithmetic the CPU is the slower one at four images, too. So both passes
are captured as graphs, and replayed from one launch each.

What is captured depends on a layout's `Frame` alone (hdl/kernels/attention.py): the number of tokens, rounded
up, and bounds of the sequences' lengths. Positions, starts and lengths are data that every step loads, so a
stream of ever new sizes is soon served by the graphs it has. Before a capture one layer of each kind is
run outside of it, which compiles kernels and lets matrix products race; nothing of the decoder's size is
ever run twice.

All graphs share one pool of memory: a forward is always followed by its own backward before another graph
runs, so what one leaves there another may overwrite. Whoever asks for a second forward first gets a plain
one. The adapter's values are brought into the packed weights before each replay, outside of the graph.
Streamed layers (hdl/memory/streaming.py) are fetched inside, but for what a pass has to find ready, or between the
graphs that a pass then consists of (hdl/kernels/pieces.py); what offloaded ones keep (hdl/memory/offload.py) goes and
comes inside, to and from host memory that is there beforehand.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hdl.kernels.attention import Frame, needs_exact_frame
from hdl.kernels.captures import Captures
from hdl.kernels.layer import Run, rehearse
from hdl.kernels.pieces import Pieces
from hdl.o1.layout import Layout, Segment

if TYPE_CHECKING:
    from hdl.kernels.fuse import FusedDecoder

MAX_GRAPHS = 24  # frames; each holds a hundred MB for its inputs, and some MB of the driver's memory


class Captured:
    """One frame's two graphs, and where they read and write."""

    def __init__(self, decoder: "FusedDecoder", frame: Frame, x: Tensor, layout: Layout, pool: Any) -> None:
        """Capture both passes; x [S, D] and layout are of the first step to come."""
        self.frame = frame
        self.run = Run.of(frame, layout, decoder.config, x)
        self.loaded: tuple[Segment, ...] = layout.segments
        self.x = x.new_zeros(frame.tokens, x.shape[1])
        shared = decoder.shared
        gradient = shared.scratch_gradient()
        # A thread that reads ahead may allocate during the capture.
        options: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
        self.forward, self.backward = forward, backward = Pieces(**options), Pieces(**options)
        # Autograd ties a leaf to the stream on which it was first used, which is not the capture's.
        shared.leaf = leaf = shared.flat.detach().requires_grad_()
        streaming, offload = decoder.streaming, decoder.offload
        offload.settle()  # a capture cannot wait for what was queued outside of it
        try:
            with streaming.recording():
                with forward.capture(), streaming.joined(forward.between), offload.joined():
                    out = decoder.passes(self.x, self.run)
                # Read by then, and not kept for backward: the gradient takes its place.
                self.out = out.detach()
                one_thread = torch.autograd.set_multithreading_enabled(False)
                with one_thread, backward.capture(), streaming.joined(backward.between), offload.joined():
                    shared.use_gradient(gradient)
                    torch.autograd.grad(out, leaf, self.out)
        finally:
            shared.leaf = shared.flat
            offload.forget()  # nothing was sent: it was only written down

    def load(self, x: Tensor, layout: Layout) -> None:
        tokens = len(x)
        self.x[:tokens].copy_(x)
        self.x[tokens:].zero_()
        if layout.segments != self.loaded:
            self.run.load(layout)
            self.loaded = layout.segments


class Forward:
    """A replayed forward pass, alive as long as its backward can come."""


class Graphs(Captures[Captured]):
    """Stands in for a decoder's training passes."""

    def __init__(self, decoder: "FusedDecoder") -> None:
        super().__init__(enabled=decoder.shared.flat.is_cuda)
        self.decoder = decoder
        self._open: weakref.ref[Forward] | None = None  # the one whose backward is still to come

    def __call__(self, x: Tensor, layout: Layout) -> Tensor | None:
        """As FusedDecoder.forward, or None where it has to be a plain call."""
        if not self._enabled or self.decoder.offload.busy or (self._open and self._open() is not None):
            return None
        captured = self._graph_for(x, layout)
        if captured is None:
            return None
        return _Replay.apply(self.decoder.shared.flat, self, captured, x, layout)  # type: ignore[no-any-return,no-untyped-call]

    def forward_alone(self, x: Tensor, layout: Layout) -> Tensor | None:
        """As __call__, of a pass without a backward; it leaves nothing open. Layers whose kept things go to host memory
        take a plain pass, which sends nothing, and so do those that ranks fetch together, whose passes tell each other
        what they are."""
        fetched = self.decoder.offloaded or self.decoder.streaming.together
        if not self._enabled or fetched or (self._open and self._open() is not None):
            return None
        with torch.enable_grad():  # for a capture, which is of both passes
            captured = self._graph_for(x, layout)
        if captured is None:
            return None
        captured.load(x, layout)
        with self.decoder.streaming.replaying("forward"):
            captured.forward.replay()
        return captured.out[: len(x)].clone()

    def start_over(self) -> None:
        """Capture anew, with the memory that there is now."""
        self.drop()
        self._enabled = self.decoder.shared.flat.is_cuda
        self._open = None

    def _graph_for(self, x: Tensor, layout: Layout) -> Captured | None:
        serving = [c for c in self.captured if c.frame.serves(layout)]
        if serving:
            captured = min(serving, key=lambda c: c.frame.tokens)
            self.captured.remove(captured)
        else:
            fresh = self._capture(x, layout)
            if fresh is None:
                return None
            captured = fresh
            if len(self.captured) >= MAX_GRAPHS:
                self.captured.pop(0)
        self.captured.append(captured)
        return captured

    def _capture(self, x: Tensor, layout: Layout) -> Captured | None:
        frame = Frame.of(layout, exact=needs_exact_frame(x.device, x.dtype))

        def capture() -> Captured:
            self._rehearse(frame, x, layout)
            return Captured(self.decoder, frame, x, layout, self.pool())

        return self.with_room(capture)

    def _rehearse(self, frame: Frame, x: Tensor, layout: Layout) -> None:
        decoder = self.decoder
        with torch.no_grad():
            sizes = rehearse(decoder.layers, decoder.norm, Run.of(frame, layout, decoder.config, x), x)
        if decoder.offload.reserve([sizes[i] for i in decoder.offloaded]):
            self.drop()  # the graphs there are copy to where the memory was

    def opened(self) -> Forward:
        """Until `closed`, or until it is let go, there is no other forward."""
        forward = Forward()
        self._open = weakref.ref(forward)
        self.decoder.offload.lend(forward)
        return forward

    def closed(self) -> None:
        self._open = None
        self.decoder.offload.give_back()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, graphs: Graphs, captured: Captured, x: Tensor, layout: Layout
    ) -> Tensor:
        captured.load(x, layout)
        ctx.graphs, ctx.captured, ctx.open = graphs, captured, graphs.opened()
        with graphs.decoder.streaming.replaying("forward"):
            captured.forward.replay()
        return captured.out[: len(x)].clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        captured: Captured = ctx.captured
        captured.out[: len(d_out)].copy_(d_out)
        captured.out[len(d_out) :].zero_()
        decoder = ctx.graphs.decoder
        with decoder.streaming.replaying("backward"):
            captured.backward.replay()
        ctx.graphs.closed()
        return decoder.shared.scratch_gradient().clone(), *[None] * 4
