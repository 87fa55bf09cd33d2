"""Small steps replayed as CUDA graphs, so that the GPU never waits for the CPU to launch kernels.

One 1024x1024 image is some 1,200 tokens: its forward and backward take the GPU 60 to 70 ms, and the CPU
longer than that to launch 2,000 kernels. Training data meets the same layouts again every epoch (a layout
is the text length and grid of each image in the pack), so the second time a layout comes, its forward and
backward are captured as two graphs, and from then on replayed from one launch each. Larger packs keep the
GPU busy by themselves and stay as they are, as do layouts met once.

Inputs are copied to where the graph reads them; the adapter's values are brought into the packed weights
before each replay, outside of the graph. All graphs share one pool of memory: a forward is always followed
by its own backward before another graph runs, so what one leaves there another may overwrite.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hdl.kernels.adapter_copies import AdapterCopies
from hdl.kernels.layer import Shared
from hdl.o1.layout import Layout, Segment

MAX_TOKENS = 2560  # of a pack; launching no longer matters above
MAX_GRAPHS = 64  # layouts; each graph is a few MB of the driver's memory


@dataclass(frozen=True)
class Captured:
    """A layout's two graphs, and where they read and write."""

    inputs: tuple[Tensor, ...]  # text, z, t, pixels
    errors: Tensor
    d_errors: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    read: tuple[object, ...]  # the layout and what was made of it: the graphs read their memory for ever


class Graphs:
    """Stands in for O1.forward while training; everything else goes through to the plain call."""

    def __init__(
        self,
        forward: Callable[..., Tensor],
        flat: nn.Parameter,
        shared: Shared,
        copies: AdapterCopies,
        last_run: Callable[[], object],
    ) -> None:
        """last_run: what the decoder made of the layout it was last called with."""
        self.eager, self.last_run = forward, last_run
        self.flat, self.shared, self.copies = flat, shared, copies
        self._seen: set[tuple[Segment, ...]] = set()
        self._captured: OrderedDict[tuple[Segment, ...], Captured] = OrderedDict()
        self._pool: Any = None
        self._gradient: Tensor | None = None
        self._enabled = flat.is_cuda

    def forward(self, text: Tensor, z: Tensor, t: Tensor, layout: Layout, measure: Any = None) -> Tensor:
        """As O1.forward. measure: with a field `pixels`, as hdl.flow.loss.X0Error, to be replayed."""
        captured = None
        if self._enabled and torch.is_grad_enabled() and hasattr(measure, "pixels"):
            captured = self._graph_of(text, z, t, layout, measure)
        if captured is None:
            return self.eager(text, z, t, layout, measure)
        return _Replay.apply(self.flat, self, captured, text, z, t, measure.pixels)  # type: ignore[no-any-return,no-untyped-call]

    def _graph_of(self, text: Tensor, z: Tensor, t: Tensor, layout: Layout, measure: Any) -> Captured | None:
        key = layout.segments
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        if layout.tokens > MAX_TOKENS:
            return None
        if key not in self._seen:
            self._seen.add(key)
            return None
        try:
            self._captured[key] = self._capture(text, z, t, layout, measure)
        except torch.OutOfMemoryError:
            self._enabled = False  # the memory of graphs comes on top of everything else's
            print("not enough memory for CUDA graphs: small steps stay bound by the CPU")
            return None
        if len(self._captured) > MAX_GRAPHS:
            self._captured.popitem(last=False)
        return self._captured[key]

    def _capture(self, text: Tensor, z: Tensor, t: Tensor, layout: Layout, measure: Any) -> Captured:
        inputs = tuple(x.detach().clone() for x in (text, z, t, measure.pixels))
        measure = replace(measure, pixels=inputs[3])
        if self._gradient is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._gradient = torch.empty_like(self.flat)
        # What is made once a layout is made before the capture; a thread that reads ahead may allocate during it.
        with torch.no_grad():
            self.eager(*inputs[:3], layout, measure)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}
        # Autograd ties a leaf to the stream on which it was first used, which is not the capture's.
        self.shared.leaf = leaf = self.flat.detach().requires_grad_()
        try:
            with torch.cuda.graph(forward, **options):
                errors = self.eager(*inputs[:3], layout, measure)
                d_errors = torch.zeros_like(errors)
            with torch.autograd.set_multithreading_enabled(False), torch.cuda.graph(backward, **options):
                self.shared.use_gradient(self._gradient)
                torch.autograd.grad(errors, leaf, d_errors)
        finally:
            self.shared.leaf = self.flat
        read = (layout, self.last_run())
        return Captured(inputs, errors.detach(), d_errors, forward, backward, read)

    def replay_forward(self, captured: Captured, inputs: tuple[Tensor, ...]) -> Tensor:
        for place, value in zip(captured.inputs, inputs):
            place.copy_(value)
        self.copies.refresh()
        captured.forward.replay()
        return captured.errors.clone()

    def replay_backward(self, captured: Captured, d_errors: Tensor) -> Tensor:
        assert self._gradient is not None
        captured.d_errors.copy_(d_errors)
        captured.backward.replay()
        return self._gradient.clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, graphs: Graphs, captured: Captured, *inputs: Tensor) -> Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        return graphs.replay_forward(captured, inputs)

    @staticmethod
    def backward(ctx: Any, d_errors: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient = ctx.graphs.replay_backward(ctx.captured, d_errors)
        return gradient, *[None] * 6
