"""Decoder layers whose kept activations wait in host memory between their forward and their backward pass.

What a layer keeps for backward (`KEPT` in hdl/kernels/layer.py) is not looked at until backward comes back to
it. The n offloaded layers have room for two of them on the GPU; copies run on a stream of their own:

    forward     0 1 | 2 3 ... n-1     leaving j queues its copy to the host, before j + 2 begins j has gone
    backward    n-1 n-2 | n-3 ... 0   the last two have never left; once j is done with, j - 2 is sent for

So a step moves the things of n - 2 layers once each way, the memory of n - 2 layers is saved at the peak between
the passes, and each copy has two visits' distance to hide behind: the layers are spread evenly, and the deepest
one is not the last layer but as far from it as they are from each other.

The host memory of a layer is page-locked, allocated when its size is first known, and used again by every step.
It holds one pass's things: another forward pass before the backward of the first keeps its own on the GPU. No
copy outlives the pass it belongs to, so both passes can be captured in CUDA graphs; then the host memory has to be
there beforehand (`reserve`), and who replays them owns it (`lend`).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hdl.memory.host import Alone, HostMemory
from hdl.memory.streaming import ALIGNMENT, Arrival, Mover, part_of

Things = dict[str, Any]  # tensors, dataclasses and tuples of them
STAYING = 2  # of the offloaded layers, those that never leave
FEWEST = STAYING + 1  # layers to offload, so that any does


class Kept(Protocol):
    """A layer's things between its forward and its backward pass."""

    def take(self) -> Things:
        """All of them, on the GPU; they are nowhere else any more."""

    def done(self) -> None:
        """Backward has let go of them."""


class Keeper(Protocol):
    """Who keeps a layer's things."""

    def make_room(self) -> None:
        """Called before they are made."""

    def put(self, things: Things) -> Kept: ...


class Here:
    """Things that stay where they are."""

    def __init__(self, things: Things) -> None:
        self._things = things

    def take(self) -> Things:
        things, self._things = self._things, {}
        return things

    def done(self) -> None:
        pass


class InPlace:
    """Keeps what it is given."""

    def make_room(self) -> None:
        pass

    def put(self, things: Things) -> Kept:
        return Here(things)


def carried(count: int, layers: int) -> list[int]:
    """Which layers to offload: the first, and evenly from there, as far from the last one as from each other."""
    return [i * layers // count for i in range(count)]


def moved(count: int) -> int:
    """How many of so many offloaded layers travel: the first ones."""
    return max(count - STAYING, 0)


class Pass:
    """A forward pass whose things are in host memory; alive as long as its backward can come."""


class Offload:
    """The offloaded layers of a decoder; without any it does nothing."""

    def __init__(self, count: int = 0, device: torch.device | None = None) -> None:
        """count: layers; device: where they compute. outgrown, which may be replaced, is called when things need more host
        memory than was reserved, so that what had copied to where it was does so no more."""
        self.count, self.moved = count, moved(count)
        self.outgrown: Callable[[], object] = lambda: None
        self._device = device or torch.device("cpu")
        self._mover = Mover(self._device)
        self._host: list[HostMemory | None] = [None] * self.moved
        self._now: Pass | None = None  # the forward pass that runs, if its things travel
        self._owner: weakref.ref[object] | None = None  # whose things the host memory holds
        self._sent: dict[int, Any] = {}  # by layer: its things with `Place` for tensors
        # What a copy reads or fills, held until somebody has waited for it.
        self._leaving: dict[int, tuple[Things, Arrival | None]] = {}
        self._coming: dict[int, tuple[Things, Arrival | None]] = {}

    def keeper(self, j: int) -> Keeper:
        """Of the j-th offloaded layer."""
        return _Keeper(self, j)

    @property
    def busy(self) -> bool:
        """Whether a pass is still to come back for its things."""
        return self._owner is not None and self._owner() is not None

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around a forward pass of all layers."""
        if self.moved and torch.is_grad_enabled() and not self.busy:
            self.settle()
            self._now = Pass()
            self._owner = weakref.ref(self._now)
        try:
            yield
        finally:
            self._now = None

    def lend(self, owner: object) -> None:
        """Let the host memory belong to a replayed pass, until `give_back` or until it is let go."""
        self.settle()
        self._owner = weakref.ref(owner) if self.moved else None

    def give_back(self) -> None:
        self._owner = None

    def reserve(self, sizes: Sequence[int]) -> bool:
        """Have host memory for things of so many bytes, by layer; whether any had to be allocated anew, which
        invalidates captured passes. HdlError when the host has not got it."""
        grown = [self._reserve(j, size) for j, size in enumerate(sizes[: self.moved])]
        return any(grown)

    def settle(self) -> None:
        """Let the current stream go on only when no copy is under way."""
        for pending in (self._leaving, self._coming):
            for j in list(pending):
                self._wait(pending, j)

    def forget(self) -> None:
        """Start over: nobody comes back for what was sent."""
        self.settle()
        self._now = self._owner = None
        self._sent.clear()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Around one pass inside of its capture: a capture that ends with copies astray hides its error."""
        try:
            yield
        finally:
            self.settle()

    def _reserve(self, j: int, size: int) -> bool:
        host = self._host[j]
        if host is not None and len(host.bytes) >= size:
            return False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a copy may still be using what is there
        self._host[j] = None  # given back first
        self._host[j] = HostMemory(size, self._device, Alone(), "model.offload")
        return True

    def send(self, j: int, things: Things) -> None:
        """Queue the copy to host memory; the things are held here until it is done."""
        places = _Places()
        self._sent[j] = change(things, places.place)
        if self._reserve(j, places.end):
            self.outgrown()
        # A layer's input knows what made it, and with it this whole pass, which could then never be let go.
        things = change(things, lambda tensor: tensor.detach() if tensor.requires_grad else tensor)
        pairs = list(zip(self._views(j), _tensors(things), strict=True))
        self._leaving[j] = things, self._mover.copy_all(pairs)

    def see_off(self, j: int) -> None:
        """From here on the memory of things that were sent is free."""
        self._wait(self._leaving, j)

    def request(self, j: int) -> None:
        """Queue the copy back."""
        if j not in self._sent or j in self._coming:
            return
        things = change(self._sent[j], lambda place: place.room(self._device), Place)
        pairs = list(zip(_tensors(things), self._views(j), strict=True))
        self._coming[j] = things, self._mover.copy_all(pairs)

    def receive(self, j: int) -> Things:
        self.request(j)
        things = self._wait(self._coming, j)
        del self._sent[j]
        assert things is not None
        return things

    def _wait(self, pending: dict[int, tuple[Things, Arrival | None]], j: int) -> Things | None:
        things, arrival = pending.pop(j, (None, None))
        if arrival is not None:
            arrival.wait()
        return things

    def _views(self, j: int) -> list[Tensor]:
        host = self._host[j]
        assert host is not None
        return [part_of(host.bytes[place.start :], place.part) for place in _found(self._sent[j], Place)]


class _Keeper:
    def __init__(self, offload: Offload, j: int) -> None:
        self.offload, self.j = offload, j

    def make_room(self) -> None:
        self.offload.see_off(self.j - STAYING)

    def put(self, things: Things) -> Kept:
        now = self.offload._now
        return Here(things) if now is None else _Travelling(self.offload, self.j, now, things)


class _Travelling:
    """A layer's things, in host memory if it is one that moves."""

    def __init__(self, offload: Offload, j: int, owner: Pass, things: Things) -> None:
        self.offload, self.j = offload, j
        self.owner: Pass | None = owner
        self.things: Things | None = things
        if j < offload.moved:
            self.things = None
            offload.send(j, things)

    def take(self) -> Things:
        things, self.things = self.things, None
        return self.offload.receive(self.j) if things is None else things

    def done(self) -> None:
        self.offload.request(self.j - STAYING)
        if self.j == 0:
            self.offload.give_back()
        self.owner = None


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its layer's host memory, and its shape and dtype."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def part(self) -> tuple[tuple[int, ...], torch.dtype]:
        return self.shape, self.dtype

    def room(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class _Places:
    def __init__(self) -> None:
        self.end = 0

    def place(self, tensor: Tensor) -> Place:
        assert tensor.is_contiguous(), "what is kept is copied as it lies in memory"
        place = Place(self.end, tuple(tensor.shape), tensor.dtype)
        self.end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return place


def size_of(things: Things) -> int:
    """Bytes of host memory that they take."""
    places = _Places()
    change(things, places.place)
    return places.end


def change(things: Any, to: Callable[[Any], Any], of: type = Tensor) -> Any:
    """The same with every `of` in it replaced."""
    if isinstance(things, of):
        return to(things)
    if isinstance(things, dict):
        return {name: change(thing, to, of) for name, thing in things.items()}
    if isinstance(things, tuple):
        return tuple(change(thing, to, of) for thing in things)
    if is_dataclass(things) and not isinstance(things, type):
        return replace(things, **{f.name: change(getattr(things, f.name), to, of) for f in fields(things)})
    return things


def _found(things: Any, of: type) -> list[Any]:
    found: list[Any] = []

    def find(thing: Any) -> Any:
        found.append(thing)
        return thing

    change(things, find, of)
    return found


def _tensors(things: Things) -> list[Tensor]:
    return _found(things, Tensor)
