"""Offloaded layers: where their things are and when, in which order they go and come, and that nothing changes."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hdl.kernels import gemm
from hdl.kernels import layer as layers
from hdl.kernels.fuse import fuse, graphs_of, keep_less
from hdl.kernels.graphs import Forward, Graphs
from hdl.kernels.layer import KEPT, rehearse
from hdl.kernels.linears import Buffer
from hdl.memory import offload
from hdl.memory.offload import Offload, Things, carried, change, moved, size_of
from hdl.o1.layout import Segment
from tests.kernels.test_fused import EQUAL, MIXED, REAL, SMALL, Case, adapted_model
from tests.memory.test_streaming import (
    SEVERAL,
    assert_same_steps,
    decoder_of,
    drawn,
    gpu,
    in_bfloat16,
)

LAYERS = 6
CONFIG = replace(SMALL, num_hidden_layers=LAYERS)
MIXED_LEVELS = ["input", "everything", "products", "attention", "input", "everything"]


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(gemm, "measure", False)  # whoever wins a race sums in an order of its own


@pytest.mark.parametrize(("count", "count_of_layers"), [(3, 36), (4, 36), (12, 36), (35, 36), (36, 36)])
def test_offloaded_layers_are_spread_from_the_first_one(count: int, count_of_layers: int) -> None:
    chosen = carried(count, count_of_layers)
    assert len(set(chosen)) == count and chosen == sorted(chosen) and chosen[0] == 0
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], count_of_layers])]
    assert max(gaps) - min(gaps) <= 1, "the last one, too, has such a distance to the end"
    assert moved(count) == count - 2 and moved(2) == moved(0) == 0


class LateMover:
    """The worst that a stream of its own may do: a copy begins at once, and is complete only when somebody waits
    for it. In between its target holds what is no number, and neither side may be let go."""

    log: list[str]

    def __init__(self, device: torch.device) -> None:
        pass

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> "Late":
        self.log.append("fetch" if hasattr(pairs[0][1], "on_host") else "send")
        for into, _ in pairs:
            into.fill_(torch.nan)
        return Late(pairs)


class Late:
    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.pairs = [tuple(self._hold(tensor) for tensor in pair) for pair in pairs]

    @staticmethod
    def _hold(tensor: Tensor) -> Any:
        """Host memory stays; what is on the GPU is for others to hold."""
        return (lambda: tensor) if hasattr(tensor, "on_host") else weakref.ref(tensor)

    @torch.no_grad()
    def wait(self) -> None:
        for into, source in self.pairs:
            assert into() is not None and source() is not None, "let go with a copy under way"
            into().copy_(source())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the copies are asked for."""
    events: list[str] = []
    monkeypatch.setattr(LateMover, "log", events, raising=False)
    monkeypatch.setattr(offload, "Mover", LateMover)
    monkeypatch.setattr(Graphs, "__call__", lambda *_: None)  # a copy that comes late cannot be captured
    view = offload.part_of

    def marked(*arguments: Any) -> Tensor:
        found = view(*arguments)
        found.on_host = True  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(offload, "part_of", marked)
    yield events


def pair(keep: str | list[str], count: int, **settings: Any) -> tuple[PeftModel, PeftModel]:
    """A model that offloads, and one that does not."""
    model, same = adapted_model(CONFIG), adapted_model(CONFIG)
    fuse(model, keep=keep, offload=count, **settings)
    fuse(same, keep=keep, **settings)
    return model, same


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("keep", [*KEPT, MIXED_LEVELS], ids=lambda k: str(k)[:10])
def test_offloading_changes_no_bit(keep: str | list[str], count: int, log: list[str]) -> None:
    model, same = pair(keep, count)
    first, second = Case(CONFIG, MIXED, seed=1), Case(CONFIG, EQUAL, seed=2)
    assert_same_steps(
        model, same, [first, second]
    )  # the second is smaller: its things need less of the memory
    assert torch.equal(drawn(model, first), drawn(same, first))
    assert_same_steps(model, same, [second, first])
    assert log.count("send") == log.count("fetch") == 4 * moved(count), "drawing sends nothing"


@pytest.mark.parametrize("form", ["full", "fp8", "nf4"])
def test_beside_streamed_weights(form: str, log: list[str]) -> None:
    model, same = pair("products", 5, weights=form, stream=4)
    case = Case(CONFIG, MIXED)
    assert_same_steps(model, same, [case, case])
    assert log.count("send") == 6


def test_the_order_of_things(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(CONFIG)
    fuse(model, offload=4)  # layers 0, 1, 3 and 4, of which 0 and 1 move
    decoder = decoder_of(model)
    assert decoder.offloaded == [0, 1, 3, 4]
    make, back = layers.Made._make_out, layers.backward
    number = {layer: i for i, layer in enumerate(decoder.layers)}

    def made(self: layers.Made) -> None:
        log.append(f"{number[self.layer]} up")
        make(self)

    def backward(made: layers.Made, dout: Tensor) -> Tensor | None:
        log.append(f"{number[made.layer]} down")
        return back(made, dout)

    monkeypatch.setattr(layers.Made, "_make_out", made)
    monkeypatch.setattr(layers, "backward", backward)
    Case(CONFIG, EQUAL).run(model)
    assert log == [
        *["0 up", "send", "1 up", "send", "2 up", "3 up", "4 up", "5 up"],
        *["5 down", "4 down", "fetch", "3 down", "fetch", "2 down", "1 down", "0 down"],
    ]


def test_never_more_than_two_layers_things_are_on_the_gpu(log: list[str]) -> None:
    """All layers offloaded: when one is made or needed, only its neighbour's are there beside its own."""
    model, case = adapted_model(CONFIG), Case(CONFIG, EQUAL)
    fuse(model, offload=LAYERS)
    alive: list[list[weakref.ref[Tensor]]] = []

    def here() -> int:
        return sum(any(ref() is not None for ref in refs) for refs in alive)

    def watch(things: Things) -> Things:
        big = [things[name].wide for name in ("qkv_in", "gate_up_in", "down_in")]
        alive.append([weakref.ref(tensor) for tensor in big])
        return things

    counts: dict[str, list[int]] = {"forward": [], "backward": []}
    keep, back, request = layers.Made.kept, layers.backward, Offload.request

    def kept(self: layers.Made, names: frozenset[str]) -> Things:
        things = watch(keep(self, names))
        counts["forward"].append(here())
        return things

    def backward(made: layers.Made, dout: Tensor) -> Tensor | None:
        counts["backward"].append(here())
        return back(made, dout)

    def requested(self: Offload, j: int) -> None:
        new = j not in self._coming
        request(self, j)
        if new and j in self._coming:
            watch(self._coming[j][0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.Made, "kept", kept)
        patch.setattr(layers, "backward", backward)
        patch.setattr(Offload, "request", requested)
        case.run(model)
    assert counts == {"forward": [1, 2, 2, 2, 2, 2], "backward": [2, 2, 2, 2, 2, 1]}


def test_in_any_order_of_passes(log: list[str]) -> None:
    """A forward that nobody goes back from, and two before the first backward: the second keeps its own."""
    first, second = Case(CONFIG, MIXED, seed=1), Case(CONFIG, EQUAL, seed=2)
    results = []
    for model in pair("products", 6):
        model(first.text, first.z, first.t, first.layout)
        x, y = (model(c.text, c.z, c.t, c.layout) for c in (first, second))
        (x.square().sum() + 2 * y.square().sum()).backward()
        flat = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((x.detach(), y.detach(), *flat))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert log == ["send"] * 8 + ["fetch"] * 4


def test_a_plain_pass_leaves_the_memory_of_a_replayed_one_alone(log: list[str]) -> None:
    """As graphs do it: what a replay has written is not overwritten until its backward, or until it is let go."""
    model, same = pair("products", 6)
    case, decoder = Case(CONFIG, MIXED), decoder_of(model)
    assert_same_steps(model, same, [case])
    held = [host.bytes.clone() for host in decoder.offload._host if host]
    replayed = Forward()
    decoder.offload.lend(replayed)
    log.clear()
    assert_same_steps(model, same, [case])
    assert not log and decoder.offload.busy
    now = [host.bytes for host in decoder.offload._host if host]
    assert held and all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
    del replayed
    assert not decoder.offload.busy
    assert_same_steps(model, same, [case])
    assert log.count("send") == log.count("fetch") == 4
    decoder.offload.lend(owner := Forward())
    decoder.offload.give_back()  # after its backward, though it is still alive
    assert not decoder.offload.busy and owner


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_a_pass_that_ran_out_of_memory(
    where: str, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, same = pair("everything", 6)
    case = Case(CONFIG, MIXED)
    assert_same_steps(model, same, [case])
    back, make, calls = layers.backward, layers.Made._make_out, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return back(*arguments) if where == "backward" else make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*((layers, "backward") if where == "backward" else (layers.Made, "_make_out")), failing)
        with pytest.raises(torch.OutOfMemoryError):
            case.run(model)
    decoder = decoder_of(model)
    assert decoder.offload._leaving or decoder.offload._coming, "copies are under way"
    assert not decoder.offload.busy, "what was sent does not keep its own pass alive"
    model.zero_grad()
    for m in (model, same):
        assert keep_less(m)
        decoder_of(m).shared.forget()
    assert_same_steps(model, same, [case, case])
    assert not decoder.offload._leaving and not decoder.offload._coming and not decoder.offload.busy


def test_host_memory_is_allocated_once(log: list[str]) -> None:
    model, case = adapted_model(CONFIG), Case(CONFIG, MIXED)
    fuse(model, keep="products", offload=5)
    case.run(model)
    host = list(decoder_of(model).offload._host)
    assert len(host) == 3
    Case(CONFIG, EQUAL).run(model)
    case.run(model)
    assert all(a is b for a, b in zip(host, decoder_of(model).offload._host, strict=True))


def test_a_plain_pass_that_needs_more_forgets_the_graphs_that_copy_there(log: list[str]) -> None:
    """As of pairs, which no graph takes. On a GPU, graphs have the memory's addresses in them."""
    model, small, large = adapted_model(CONFIG), Case(CONFIG, EQUAL[:1]), Case(CONFIG, MIXED)
    fuse(model, keep="products", offload=5)
    decoder = decoder_of(model)
    decoder.graphs = Graphs(decoder)
    small.run(model)
    host = list(decoder.offload._host)
    decoder.graphs._enabled = False  # plain passes
    decoder.graphs.captured.append(captured := object())  # type: ignore[arg-type]
    small.run(model)
    assert decoder.graphs.captured == [captured]
    large.run(model)
    assert not decoder.graphs.captured
    assert len(host) == 3 and not any(a is b for a, b in zip(host, decoder.offload._host))


def test_its_size_is_known_from_a_rehearsal(log: list[str]) -> None:
    model, case = adapted_model(CONFIG), Case(CONFIG, MIXED)
    fuse(model, keep=MIXED_LEVELS, offload=6)
    decoder = decoder_of(model)
    with torch.no_grad():
        x = torch.empty(case.layout.tokens, CONFIG.hidden_size, device=case.text.device)
        sizes = rehearse(decoder.layers, decoder.norm, decoder._run_of(case.layout, x), x)
    wanted = [sizes[i] for i in decoder.offloaded]
    assert decoder.offload.reserve(wanted) and not decoder.offload.reserve(wanted)
    host = list(decoder.offload._host)
    case.run(model)
    assert all(a is b for a, b in zip(host, decoder.offload._host, strict=True))
    assert [len(h.bytes) for h in host if h] == wanted[:4]


def test_things_are_taken_apart_and_put_together() -> None:
    things = {"x": torch.ones(2, 3), "b": Buffer(torch.ones(4, 5), 3, None), "t": (torch.ones(7), None)}
    doubled = change(things, lambda tensor: 2 * tensor)
    assert torch.equal(doubled["b"].wide, 2 * torch.ones(4, 5)) and doubled["b"].width == 3
    assert torch.equal(doubled["t"][0], 2 * torch.ones(7)) and doubled["t"][1] is None
    assert size_of(things) == 3 * 256


def test_more_layers_than_there_are() -> None:
    for count in (-1, LAYERS + 1):
        with pytest.raises(ValueError, match="offload .*: expected 0 to 6"):
            fuse(adapted_model(CONFIG), offload=count)


@gpu
@pytest.mark.parametrize("replays", [True, False], ids=["replayed", "plain"])
@pytest.mark.parametrize("streamed", [0, 4])
@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("form", ["full", "fp8"])
def test_on_a_gpu_offloading_changes_no_bit(form: str, count: int, streamed: int, replays: bool) -> None:
    """With graphs and without; drawing in between, and a graph captured after it, for more tokens."""
    model, same = (adapted_model(CONFIG, torch.bfloat16) for _ in range(2))
    fuse(model, weights=form, keep=MIXED_LEVELS, stream=streamed, offload=count)
    fuse(same, weights=form, keep=MIXED_LEVELS, stream=streamed)
    graphs, plain = graphs_of(model), graphs_of(same)
    assert graphs and plain
    plain._enabled, graphs._enabled = False, replays
    cases = [in_bfloat16(Case(CONFIG, segments, seed)) for seed, segments in enumerate(SEVERAL)]
    assert_same_steps(model, same, cases)
    assert torch.equal(drawn(model, cases[2]), drawn(same, cases[2]))
    assert_same_steps(model, same, list(reversed(cases)))
    x = [
        m(c.text, c.z, c.t, c.layout) for m in (model, same) for c in cases[:2]
    ]  # two forwards, then backwards
    gradients = []
    for m, outs in ((model, x[:2]), (same, x[2:])):
        m.zero_grad()
        (outs[0].float().sum() + outs[1].float().square().sum()).backward()
        gradients.append([p.grad for p in m.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@gpu
@pytest.mark.parametrize("keep", ["everything", "products"])
def test_at_the_real_shapes_copies_overlap_and_change_no_bit(
    keep: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Things of 0.1 GB take long enough that a wait that is missing shows; and the memory is saved."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # attention's backward, between two runs of the same
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    request.addfinalizer(partial(torch.use_deterministic_algorithms, deterministic))
    config = replace(REAL, num_hidden_layers=8)
    case = in_bfloat16(Case(config, [Segment(160, 32, 32)]))
    peaks = []
    results = []
    for count in (0, 8):
        model = adapted_model(config, torch.bfloat16)
        fuse(model, keep=keep, offload=count)
        steps = [case.run(model) for _ in range(3)]
        graphs = graphs_of(model)
        assert graphs
        with graphs.paused():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            steps.append(case.run(model))
            peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append(steps)
        del model, graphs
        gc.collect()
        torch.cuda.empty_cache()
    for (x, g), (wanted, wanted_g) in zip(*results, strict=True):
        assert torch.equal(x, wanted) and all(torch.equal(g[name], wanted_g[name]) for name in wanted_g)
    saved = 6 * 1184 * 2 * (4096 + 6144 + 4096 + 4096 + 24576)  # of 8 layers two stay; products at the least
    assert peaks[0] - peaks[1] > 0.9 * saved
