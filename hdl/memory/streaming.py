"""Decoder layers whose frozen weights are elsewhere and come to the GPU ahead of their use.

Elsewhere is host memory, or the GPUs of a machine, a share on each (hdl/memory/shares.py). The weights of a
streamed layer are one block of bytes, laid out alike for all of them. The GPU has two slots
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
A fetch that no graph may hold stands between two of them (hdl/kernels/pieces.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hdl.memory.host import Alone, HostMemory, Ranks

# What a visit belongs to. forward: backward follows; alone: to no pass.
Way = Literal["forward", "forward only", "backward", "alone"]
Part = tuple[tuple[int, ...], torch.dtype]
Between = Callable[[Callable[[], object]], None]  # has something done between two graphs of a captured pass
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


class Store(Protocol):
    """Where the blocks are. blocks: of each layer what a fetch reads; slot: bytes of a slot; in_graphs: whether
    a fetch can be part of a CUDA graph; together: whether other ranks have to fetch the same at the same time."""

    blocks: Sequence[Tensor]
    slot: int
    in_graphs: bool
    together: bool

    def mover(self, device: torch.device, slots: Sequence[Tensor]) -> Any:
        """What fetches: a `Mover`, or something like it."""

    def mine(self, j: int) -> bool:
        """Whether this rank brings the weights of layer j in."""

    def put(self, j: int, slot: Tensor) -> None:
        """Keep layer j, which is in the slot if it is this rank's; called for each layer in turn, by all ranks."""

    def whole(self, j: int, slot: Tensor) -> Tensor:
        """The block of layer j, there or in the slot, once all are kept; asked by all ranks."""


class HostStore:
    """Blocks in host memory, once a machine."""

    in_graphs, together = True, False

    def __init__(self, size: int, count: int, device: torch.device, ranks: Ranks) -> None:
        self.slot = size
        self._host = HostMemory(size * count, device, ranks)
        self.blocks = self._host.bytes.split(size)

    def mover(self, device: torch.device, slots: Sequence[Tensor]) -> "Mover":
        return Mover(device, slots)

    def mine(self, j: int) -> bool:
        return j % self._host.ranks == self._host.rank

    def put(self, j: int, slot: Tensor) -> None:
        if self.mine(j):
            self.blocks[j].copy_(slot)

    def whole(self, j: int, slot: Tensor) -> Tensor:
        return self.blocks[j]


class Streaming:
    """The streamed layers of a decoder; without any it does nothing."""

    def __init__(
        self,
        layers: Sequence[Sequence[Movable]] = (),
        ranks: Ranks | None = None,
        store: Callable[[int, int, torch.device, Ranks], Store] = HostStore,
    ) -> None:
        """layers: the linears of each, whose weights are brought in now, each layer's by one rank of a machine.

        ranks: the run's processes, which all come here; none: this one is alone. store: makes where the blocks are
        kept, of their size and number. HdlError when there is not enough host memory.
        """
        self.count = len(layers)
        self.slots: list[Tensor] = []
        self.held: list[int | None] = []  # by slot, the layer in it or on its way there
        self.coming: list[Arrival | None] = []  # by slot, what nobody has waited for yet
        self.together = False
        self._between: Between | None = None  # while a pass is captured whose fetches stand between graphs
        self._left = 0  # visits of the pass that runs, so far
        if not layers:
            return
        ranks = ranks or Alone()
        device = layers[0][0].device
        block = _Block([linear.kept_as() for linear in layers[0]])
        self._store = store(block.size, self.count, device, ranks)
        self.together = self._store.together
        self._blocks = self._store.blocks
        self.slots = [
            torch.empty(self._store.slot, dtype=torch.uint8, device=device) for _ in range(min(self.count, 2))
        ]
        self.mover = self._store.mover(device, self.slots)
        for j, linears in enumerate(layers):
            self._bring_in(j, linears, block)
        ranks.gather(None)  # all are filled
        for j, linears in enumerate(layers):
            whole = self._store.whole(j, self.slots[j % 2])
            for linear, parts in zip(linears, block.views(whole)):
                linear.remember(parts)
        self.held, self.coming = [None] * len(self.slots), [None] * len(self.slots)

    def _bring_in(self, j: int, linears: Sequence[Movable], block: "_Block") -> None:
        slot, mine = self.slots[j % 2], self._store.mine(j)
        for linear, parts in zip(linears, block.views(slot)):
            assert linear.kept_as() == [(tuple(part.shape), part.dtype) for part in parts]
            linear.keep_in(parts)
            linear.fill() if mine else linear.pass_over()
        self._store.put(j, slot)

    def visits(self, j: int) -> Callable[[Way], AbstractContextManager[None]]:
        """What surrounds everything that reads the weights of layer j."""
        return partial(self._visit, j)

    @contextmanager
    def _visit(self, j: int, way: Way) -> Iterator[None]:
        if way == "alone" and self.together:
            yield  # with whatever is in the slot: the others do not take part
            return
        self._request(j)
        self._await(j % 2)
        yield
        following = after(j, way, self.count)
        if following is not None:
            self._request(following)
        self._left = self._order(way).index(j) + 1

    def prepare(self, way: Way) -> None:
        """Have the slots begin such a pass, or have it on its way."""
        for j in self._first(way):
            self._request(j)

    def begin(self) -> None:
        """A pass is to come that may break off."""
        self._left = 0

    def finish(self, way: Way) -> None:
        """Fetch what is left of such a pass, which was not begun or broke off, as the other ranks do."""
        if self._left == 0:
            self.prepare(way)
        for j in self._order(way)[self._left :]:
            with self._visit(j, way):
                pass

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the capture of a forward and its backward: nothing moves while a capture only writes down."""
        self._settle("forward")
        held, left = list(self.held), self._left
        try:
            yield
        finally:
            self.held, self.coming, self._left = held, [None] * len(held), left

    @contextmanager
    def joined(self, between: Between | None = None) -> Iterator[None]:
        """Around one pass inside of its capture: a capture that ends with the copies astray hides its error.
        between: for fetches that no graph may hold, all of which the pass waits for itself."""
        self._between = between if self.count and not self._store.in_graphs else None
        try:
            yield
        finally:
            if not self._between:
                self._await_all()
            self._between = None

    @contextmanager
    def replaying(self, way: Way) -> Iterator[None]:
        """Around the replay of a captured pass."""
        self._settle(way)
        yield
        for j in self._first("forward" if way == "backward" else "backward"):
            self.held[j % 2] = j
        self._left = self.count

    def _order(self, way: Way) -> Sequence[int]:
        """Of the visits of such a pass."""
        return range(self.count)[::-1] if way == "backward" else range(self.count)

    def _first(self, way: Way) -> Sequence[int]:
        """What the slots hold when such a pass begins, in the order of visits."""
        return self._order(way)[:2]

    def _settle(self, way: Way) -> None:
        self.prepare(way)
        self._await_all()

    def _request(self, j: int) -> None:
        slot = j % 2
        if self.held[slot] == j:
            return
        self.held[slot] = j
        if self._between:
            self.coming[slot] = WrittenDown()
            self._between(partial(self._fetch, j))
        else:
            self._fetch(j)

    def _await_all(self) -> None:
        for slot in range(len(self.slots)):
            self._await(slot)

    def _await(self, slot: int) -> None:
        if self._between and self.coming[slot] is not None:
            self.coming[slot] = None
            self._between(partial(self._arrive, slot))
        else:
            self._arrive(slot)

    def _fetch(self, j: int) -> None:
        self.coming[j % 2] = self.mover.copy(self.slots[j % 2], self._blocks[j])

    def _arrive(self, slot: int) -> None:
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


class WrittenDown:
    """Stands for a copy while a capture writes down that it will be made."""

    def wait(self) -> None:
        pass


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
