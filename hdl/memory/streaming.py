"""Decoder layers whose frozen weights stay in host memory and come to the GPU ahead of their use.

The weights of a streamed layer are one block of bytes, laid out alike for all of them. The GPU has two slots
for a block. Forward visits the streamed layers upwards, backward downwards, and layer j (counting streamed
ones) is always in slot j % 2; when it is left, the copy of the next one that belongs there is queued on a
stream of its own, behind the last kernel that read the slot:

    forward        0 1 | 2 3 ... m-1        begins with 0 and 1 in the slots, ends with the last two
    backward       m-1 m-2 | m-3 ... 0      begins where forward ended, and ends where the next one begins

So a training step moves 2m - 4 blocks, and each has two visits' distance to hide behind; the memory of m - 2
layers is saved. A forward pass without a backward one goes round: its last visits bring 0 and 1 back.

What a pass fetches depends only on what the slots hold when it begins, and every block that a training
pass asks for is waited for in the same pass. Both passes can therefore be captured in CUDA graphs, if they
begin with the slots as above (`recording`, `replaying`). Out of order, a visit fetches what it needs itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from hdl.memory.host import Alone, HostMemory, Ranks

# What a visit belongs to. forward: backward follows; alone: to no pass.
Way = Literal["forward", "forward only", "backward", "alone"]
Part = tuple[tuple[int, ...], torch.dtype]
ALIGNMENT = 256  # bytes


class Movable(Protocol):
    """Frozen weights that can be anywhere (hdl.kernels.restored.RestoredLinear)."""

    @property
    def device(self) -> torch.device:
        """Where they are multiplied with."""

    def kept_as(self) -> list[Part]:
        """Shape and dtype of each tensor that moves."""

    def keep_in(self, parts: Sequence[Tensor]) -> None:
        """Let these tensors be the weights from now on, whatever is in them."""

    def fill(self) -> None:
        """Bring the model's weights into them."""

    def pass_over(self) -> None:
        """Let go of the model's weights, which somebody else brings."""

    def remember(self, parts: Sequence[Tensor]) -> None:
        """Keep what is needed between visits; parts: the filled tensors, on the host."""


def spread(streamed: int, layers: int) -> list[int]:
    """Which layers to stream: both ends, where a block has a whole pass to come, and evenly between."""
    if streamed == 1:
        return [0]
    return [round(i * (layers - 1) / (streamed - 1)) for i in range(streamed)]


def block_bytes(linears: Sequence[Movable]) -> int:
    """Size of a layer's block."""
    return _Block([linear.kept_as() for linear in linears]).size


def resident(way: Way) -> AbstractContextManager[None]:
    """The visit of a layer that is where it is."""
    return nullcontext()


class Streaming:
    """The streamed layers of a decoder; without any it does nothing."""

    def __init__(self, layers: Sequence[Sequence[Movable]] = (), ranks: Ranks | None = None) -> None:
        """layers: the linears of each, whose weights are brought in now, each layer's by one rank of a machine.

        ranks: the run's processes, which all come here; none: this one is alone. HdlError when there is not
        enough host memory.
        """
        self.count = len(layers)
        self.slots: list[Tensor] = []
        self.held: list[int | None] = []  # by slot, the layer in it or on its way there
        self.coming: list[Arrival | None] = []  # by slot, what nobody has waited for yet
        if not layers:
            return
        ranks = ranks or Alone()
        device = layers[0][0].device
        block = _Block([linear.kept_as() for linear in layers[0]])
        self._host = HostMemory(block.size * self.count, device, ranks)
        self._blocks = self._host.bytes.split(block.size)
        self.slots = [
            torch.empty(block.size, dtype=torch.uint8, device=device) for _ in range(min(self.count, 2))
        ]
        self.mover = Mover(device, self.slots)
        for j, linears in enumerate(layers):
            self._bring_in(j, linears, block, mine=j % self._host.ranks == self._host.rank)
        ranks.gather(None)  # all are filled
        for j, linears in enumerate(layers):
            for linear, parts in zip(linears, block.views(self._blocks[j])):
                linear.remember(parts)
        self.held, self.coming = [None] * len(self.slots), [None] * len(self.slots)

    def _bring_in(self, j: int, linears: Sequence[Movable], block: "_Block", mine: bool) -> None:
        slot = self.slots[j % 2]
        for linear, parts in zip(linears, block.views(slot)):
            assert linear.kept_as() == [(tuple(part.shape), part.dtype) for part in parts]
            linear.keep_in(parts)
            linear.fill() if mine else linear.pass_over()
        if mine:
            self._blocks[j].copy_(slot)

    def visits(self, j: int) -> Callable[[Way], AbstractContextManager[None]]:
        """What surrounds everything that reads the weights of layer j."""
        return partial(self._visit, j)

    @contextmanager
    def _visit(self, j: int, way: Way) -> Iterator[None]:
        self._request(j)
        self._await(j % 2)
        yield
        following = after(j, way, self.count)
        if following is not None:
            self._request(following)

    def prepare(self, way: Way) -> None:
        """Have the slots begin such a pass, or have it on its way."""
        for j in self._first(way):
            self._request(j)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the capture of a forward and its backward: nothing moves while a capture only writes down."""
        self._settle("forward")
        held = list(self.held)
        try:
            yield
        finally:
            self.held, self.coming = held, [None] * len(held)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Around one pass inside of its capture: a capture that ends with the copies astray hides its error."""
        try:
            yield
        finally:
            self._await_all()

    @contextmanager
    def replaying(self, way: Way) -> Iterator[None]:
        """Around the replay of a captured pass."""
        self._settle(way)
        yield
        for j in self._first("forward" if way == "backward" else "backward"):
            self.held[j % 2] = j

    def _first(self, way: Way) -> list[int]:
        """What the slots hold when such a pass begins, in the order of visits."""
        order = range(self.count)
        return list(reversed(order))[:2] if way == "backward" else list(order)[:2]

    def _settle(self, way: Way) -> None:
        self.prepare(way)
        self._await_all()

    def _request(self, j: int) -> None:
        slot = j % 2
        if self.held[slot] != j:
            self.held[slot] = j
            self.coming[slot] = self.mover.copy(self.slots[slot], self._blocks[j])

    def _await_all(self) -> None:
        for slot in range(len(self.slots)):
            self._await(slot)

    def _await(self, slot: int) -> None:
        arrival, self.coming[slot] = self.coming[slot], None
        if arrival is not None:
            arrival.wait()


def after(j: int, way: Way, count: int) -> int | None:
    """Which streamed layer is to follow j in its slot, if another one is."""
    if way == "backward":
        return j - 2 if j >= 2 else None
    if way == "alone":
        return None
    return j + 2 if j + 2 < count else None if way == "forward" else j % 2


class Arrival(Protocol):
    def wait(self) -> None:
        """Let the current stream go on only when the copy is complete."""


class Mover:
    """Copies between host memory and a device on a stream of its own; on a CPU, at once."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor] = ()) -> None:
        """slots: memory that it fills again and again, until it is let go."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream:
            for slot in slots:
                slot.record_stream(
                    self._stream
                )  # freed with a copy under way, it is nobody else's until then

    def copy(self, slot: Tensor, block: Tensor) -> Arrival | None:
        return self.copy_all([(slot, block)])

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival | None:
        """Into the first of each pair from the second, once all that is queued on the current stream, which may
        read the one and make the other, is done."""
        if self._stream is None:
            for into, source in pairs:
                into.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
            return self._stream.record_event()


class _Block:
    """Where the parts of a layer's linears are in its block; parts: of each linear."""

    def __init__(self, parts: Sequence[Sequence[Part]]) -> None:
        self._placed: list[list[tuple[int, Part]]] = []
        end = 0
        for linear in parts:
            self._placed.append([])
            for shape, dtype in linear:
                self._placed[-1].append((end, (shape, dtype)))
                bytes_ = torch.Size(shape).numel() * dtype.itemsize
                end += -(-bytes_ // ALIGNMENT) * ALIGNMENT
        self.size = end

    def views(self, block: Tensor) -> list[list[Tensor]]:
        """The parts of each linear in a block, uint8 [size]."""
        return [[part_of(block[start:], part) for start, part in linear] for linear in self._placed]


def part_of(block: Tensor, part: Part) -> Tensor:
    """The tensor that a block of bytes begins with."""
    shape, dtype = part
    return block[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
