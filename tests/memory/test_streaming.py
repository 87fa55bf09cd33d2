"""Streamed layers: where they are, in which order they come and go, and that nothing else changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hdl.adapter.lora import adapter_parameters, attach
from hdl.config import Lora
from hdl.kernels import fuse as fusing
from hdl.kernels import gemm
from hdl.kernels.fuse import FORMS, STREAMED, FusedDecoder, fuse, fuse_with, streamed_bytes
from hdl.kernels.graphs import Graphs
from hdl.kernels.layer import KEPT
from hdl.kernels.scratch import Scratch
from hdl.memory import host, streaming
from hdl.memory.host import Alone, HostMemory, available
from hdl.memory.streaming import Streaming, Way, after, spread
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.layout import Segment
from tests.kernels.test_fused import (
    DEVICE,
    EQUAL,
    MIXED,
    REAL,
    SMALL,
    Case,
    adapted_model,
    distance,
    worst,
)

GPU = torch.cuda.is_available()
LAYERS = 5
CONFIG = replace(SMALL, num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(gemm, "measure", False)  # whoever wins a race sums in an order of its own


@pytest.mark.parametrize(("streamed", "layers"), [(1, 36), (2, 36), (3, 36), (12, 36), (18, 36), (35, 36)])
def test_streamed_layers_are_spread_over_the_depth(streamed: int, layers: int) -> None:
    chosen = spread(streamed, layers)
    assert len(set(chosen)) == streamed and chosen == sorted(chosen) and chosen[0] == 0
    if streamed > 1:
        assert chosen[-1] == layers - 1
        gaps = {b - a for a, b in pairwise(chosen)}
        assert max(gaps) - min(gaps) <= 1
    assert spread(layers, layers) == list(range(layers))


class LateMover:
    """The worst that a stream of its own may do: a copy begins at once, and is complete only when somebody
    waits for it. In between the slot holds what is no number."""

    log: list[str]

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        self.slots = slots

    def copy(self, slot: Tensor, block: Tensor) -> "Late":
        self.log.append(f"fetch into {[s.data_ptr() for s in self.slots].index(slot.data_ptr())}")
        slot.fill_(0xFF)
        return Late(slot, block)


class Late:
    def __init__(self, slot: Tensor, block: Tensor) -> None:
        self.slot, self.block = slot, block

    def wait(self) -> None:
        self.slot.copy_(self.block)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a streaming decoder does, in order."""
    events: list[str] = []
    monkeypatch.setattr(LateMover, "log", events, raising=False)
    monkeypatch.setattr(streaming, "Mover", LateMover)
    for way in ("__call__", "forward_alone"):  # a copy that comes late cannot be captured
        monkeypatch.setattr(Graphs, way, lambda *_: None)
    visit = Streaming._visit

    @contextmanager
    def logged(self: Streaming, j: int, way: Way) -> Iterator[None]:
        with visit(self, j, way):
            events.append(f"enter {j}")
            yield
            events.append(f"leave {j}")

    monkeypatch.setattr(Streaming, "_visit", logged)
    return events


def resident(model: PeftModel, form: str, keep: str | list[str], streamed: int) -> FusedDecoder:
    """The same linears as with streaming, where they are."""
    scratch, chosen = Scratch(), spread(streamed, LAYERS)
    packed: list[fusing.Packed] = [
        partial(STREAMED[form] if i in chosen else FORMS[form], scratch=scratch) for i in range(LAYERS)
    ]
    return fuse_with(model, packed, keep)


def decoder_of(model: PeftModel) -> FusedDecoder:
    return model.get_submodule("base_model.model.model.language_model").forward.__self__  # type: ignore[union-attr]


def change(model: PeftModel) -> None:
    for p in adapter_parameters(model).values():
        p.data.mul_(-0.7)


def drawn(model: PeftModel, case: Case) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(case.text, case.z, case.t, case.layout)


def assert_same_steps(streamed: PeftModel, resident: PeftModel, cases: Sequence[Case]) -> None:
    for case in cases:
        (x_pred, gradients), (wanted, wanted_gradients) = case.run(streamed), case.run(resident)
        assert torch.isfinite(x_pred).all()
        assert torch.equal(x_pred, wanted)
        assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in wanted_gradients)
        for model in (streamed, resident):
            change(model)


FORMS_HERE = ["full", "fp8", "fp8_once", "fp8_stored", "nf4"]


@pytest.mark.parametrize("streamed", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS_HERE)
def test_streaming_changes_no_bit(form: str, streamed: int, log: list[str]) -> None:
    model, same = adapted_model(CONFIG), adapted_model(CONFIG)
    fuse(model, weights=form, stream=streamed)
    resident(same, form, "everything", streamed)
    first, second = Case(CONFIG, MIXED, seed=1), Case(CONFIG, EQUAL, seed=2)
    assert_same_steps(model, same, [first, second])
    assert torch.equal(drawn(model, first), drawn(same, first))
    assert torch.equal(drawn(model, second), drawn(same, second))
    assert_same_steps(model, same, [second, first])


@pytest.mark.parametrize(
    "keep", [*KEPT, ["input", "everything", "products", "attention", "input"]], ids=lambda k: str(k)[:10]
)
@pytest.mark.parametrize("form", ["full", "fp8", "nf4"])
def test_at_every_level_of_recomputation(form: str, keep: str | list[str], log: list[str]) -> None:
    model, same = adapted_model(CONFIG), adapted_model(CONFIG)
    fuse(model, weights=form, keep=keep, stream=4)
    resident(same, form, keep, 4)
    case = Case(CONFIG, MIXED)
    assert_same_steps(model, same, [case, case])


@pytest.mark.parametrize("form", ["full", "fp8_stored", "nf4"])
def test_a_streamed_layer_computes_what_the_resident_one_does(form: str) -> None:
    model, same = adapted_model(CONFIG), adapted_model(CONFIG)
    fuse(model, weights=form, stream=5)
    fuse(same, weights=form)
    (x_pred, gradients), (wanted, wanted_gradients) = (Case(CONFIG, MIXED).run(m) for m in (model, same))
    assert distance(x_pred, wanted) < 1e-6
    assert worst(gradients, wanted_gradients) < 1e-5


@pytest.mark.parametrize("form", ["fp8", "fp8_once"])
def test_a_streamed_e4m3_layer_rounds_no_more_than_the_resident_one(form: str) -> None:
    """Its LoRA side is not in e4m3, so they round differently; see also test_forms.py."""
    model, same, exact = (adapted_model(CONFIG) for _ in range(3))
    fuse(model, weights=form, stream=5)
    fuse(same, weights=form)
    results = [Case(CONFIG, MIXED).run(m) for m in (model, same, exact)]
    (x_pred, gradients), (wanted, wanted_gradients), (exactly, exact_gradients) = results
    assert distance(x_pred, exactly) < 1.2 * distance(wanted, exactly)
    for name, gradient in exact_gradients.items():
        assert distance(gradients[name], gradient) < 1.5 * distance(wanted_gradients[name], gradient), name


def test_in_any_order_of_passes(log: list[str]) -> None:
    """Two forwards before the first backward, and a forward that nobody goes back from."""
    first, second = Case(CONFIG, MIXED, seed=1), Case(CONFIG, EQUAL, seed=2)
    results = []
    for streams in (True, False):
        model = adapted_model(CONFIG)
        if streams:
            fuse(model, stream=5)
        else:
            resident(model, "full", "everything", 5)
        model(first.text, first.z, first.t, first.layout)
        x, y = (model(c.text, c.z, c.t, c.layout) for c in (first, second))
        (x.square().sum() + 2 * y.square().sum()).backward()
        flat = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((x.detach(), y.detach(), *flat))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def events(text: str) -> list[str]:
    """ "0+ 0- f0": enter 0, leave 0, fetch into slot 0."""
    names = {"+": "enter {}", "-": "leave {}"}
    return [
        f"fetch into {word[1]}" if word[0] == "f" else names[word[1]].format(word[0]) for word in text.split()
    ]


def test_the_order_of_things(log: list[str]) -> None:
    model, case = adapted_model(CONFIG), Case(CONFIG, EQUAL)
    fuse(model, stream=4)
    upwards, downwards = "0+ 0- f0 1+ 1- f1 2+ 2- 3+ 3-", "3+ 3- f1 2+ 2- f0 1+ 1- 0+ 0-"
    log.clear()
    case.run(model)
    assert log == events(f"f0 f1 {upwards} {downwards}"), "the first forward fetches what it begins with"
    log.clear()
    case.run(model)
    assert log == events(f"{upwards} {downwards}"), "2m - 4 blocks, the next two of each pass are there"
    log.clear()
    drawn(model, case)
    assert log == events("0+ 0- f0 1+ 1- f1 2+ 2- f0 3+ 3- f1")
    drawn(model, case)
    log.clear()
    case.run(model)
    assert log == events(f"{upwards} {downwards}"), "drawing leaves the slots as a step begins"
    model(case.text, case.z, case.t, case.layout)
    log.clear()
    case.run(model)
    assert log == events(f"f0 f1 {upwards} {downwards}"), "the last two were there"


@pytest.mark.parametrize("streamed", [1, 2])
def test_what_the_slots_can_hold_is_fetched_once(streamed: int, log: list[str]) -> None:
    model, case = adapted_model(CONFIG), Case(CONFIG, EQUAL)
    fuse(model, stream=streamed)
    for _ in range(2):
        case.run(model)
        drawn(model, case)
    assert sum(event.startswith("fetch") for event in log) == streamed


class Numbered:
    """Frozen weights that are their layer's number."""

    device = torch.device("cpu")

    def __init__(self, number: int) -> None:
        self.number = number

    def kept_as(self) -> list[streaming.Part]:
        return [((3,), torch.float32), ((), torch.float32), ((2, 2), torch.float32)]

    def keep_in(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts

    def fill(self) -> None:
        for part in self.parts:
            part.fill_(self.number)

    def pass_over(self) -> None:
        raise AssertionError("a process alone fills everything")

    def remember(self, parts: Sequence[Tensor]) -> None:
        assert all((part == self.number).all() for part in parts)

    def check(self) -> None:
        assert all((part == self.number).all() for part in self.parts), f"{self.number}: {self.parts}"


class Graph:
    """What a CUDA graph is: the work of a pass, written down once and done whenever it is replayed."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for do in self.work:
            do()


class Decoder:
    """Layers that are all streamed."""

    def __init__(self, count: int) -> None:
        self.layers = [Numbered(j) for j in range(count)]
        self.streaming = Streaming([[layer] for layer in self.layers])
        self.streaming.mover = self  # type: ignore[assignment]
        self.graph: Graph | None = None

    def do(self, work: Callable[[], object]) -> None:
        self.graph.work.append(work) if self.graph else work()

    def copy(self, slot: Tensor, block: Tensor) -> Late:
        self.do(lambda: slot.fill_(0xFF))
        late = Late(slot, block)
        wait = late.wait
        late.wait = lambda: self.do(wait)  # type: ignore[method-assign]
        return late

    def visits(self, way: Way) -> None:
        for j in reversed(range(len(self.layers))) if way == "backward" else range(len(self.layers)):
            with self.streaming.visits(j)(way):
                self.do(self.layers[j].check)

    def capture(self) -> dict[Way, Graph]:
        graphs: dict[Way, Graph] = {"forward": Graph(), "backward": Graph()}
        with self.streaming.recording():
            for way, self.graph in graphs.items():
                with self.streaming.joined():
                    self.visits(way)
            self.graph = None
        return graphs


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_captured_passes_find_and_leave_the_slots_right(count: int) -> None:
    decoder = Decoder(count)
    decoder.visits("forward")  # a plain one before the capture, never gone back from
    graphs = decoder.capture()
    assert sum(len(graph.work) for graph in graphs.values()) == 2 * count + 2 * max(2 * count - 4, 0)

    def replay(way: Way) -> None:
        with decoder.streaming.replaying(way):
            graphs[way].replay()

    for passes in (
        ["forward", "backward"],
        ["plain forward only", "forward", "backward"],
        ["forward", "plain forward", "plain backward", "backward"],
        ["forward", "forward", "backward", "plain alone", "forward", "plain forward only", "backward"],
        ["plain forward", "plain backward", "forward", "backward"],
    ):
        for name in passes:
            if name == "plain alone":
                with decoder.streaming.visits(count // 2)("alone"):
                    decoder.layers[count // 2].check()
            elif name.startswith("plain "):
                decoder.visits(name.removeprefix("plain "))  # type: ignore[arg-type]
            else:
                replay(name)  # type: ignore[arg-type]


def test_a_capture_that_fails_leaves_the_slots_known() -> None:
    decoder = Decoder(5)
    graph = Graph()
    with pytest.raises(torch.OutOfMemoryError), decoder.streaming.recording():
        decoder.graph = graph
        with decoder.streaming.joined():
            with decoder.streaming.visits(0)("forward"):
                assert not graph.work
            assert len(graph.work) == 1, "layer 2 has been asked for"
            raise torch.OutOfMemoryError("CUDA out of memory")
    assert len(graph.work) == 2, "and is waited for, though nobody came to need it"
    decoder.graph = None
    with decoder.streaming.visits(2)("alone"):
        decoder.layers[2].check()  # nothing had moved
    decoder.visits("forward")
    decoder.visits("backward")


def test_who_follows_whom() -> None:
    assert [after(j, "forward", 5) for j in range(5)] == [2, 3, 4, None, None]
    assert [after(j, "backward", 5) for j in range(5)] == [None, None, 0, 1, 2]
    assert [after(j, "forward only", 5) for j in range(5)] == [2, 3, 4, 1, 0]
    assert {after(j, "alone", 5) for j in range(5)} == {None}


def adapted(base: Path, absent: bool) -> PeftModel:
    model = attach(load_model(open_checkpoint(base), DEVICE, torch.float32, absent), Lora(rank=4), "base", 0)
    generator = torch.Generator().manual_seed(0)
    for p in adapter_parameters(model).values():
        p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("form", ["full", "fp8_once"])
def test_absent_weights_come_from_the_checkpoint(tiny_base: Path, form: str) -> None:
    case = Case(replace(SMALL, hidden_size=64), MIXED)
    model, whole = adapted(tiny_base, absent=True), adapted(tiny_base, absent=False)
    fuse(model, weights=form, stream=3)
    fuse(whole, weights=form, stream=3)
    assert torch.equal(case.run(model)[0], case.run(whole)[0])
    linears = [m for n, m in model.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)]
    frozen = [m for m in linears if not isinstance(m.weight, torch.nn.Parameter)]
    assert frozen and not any(hasattr(linear, "read_weight") for linear in frozen)
    streamed_ones = [m for n, m in whole.named_modules() if ".layers.0." in n and n.endswith("base_layer")]
    assert all(m.weight.untyped_storage().nbytes() == 4 for m in streamed_ones)  # type: ignore[union-attr,operator]


def test_the_size_of_a_block_is_known_without_weights() -> None:
    numbers = 4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 12288
    full, fp8, nf4 = (streamed_bytes(REAL, form, torch.bfloat16) for form in ("full", "fp8", "nf4"))
    assert full == 2 * numbers
    assert numbers < fp8 < 1.001 * numbers
    assert 0.515 * numbers < nf4 < 0.52 * numbers
    model = adapted_model(CONFIG)
    fuse(model, weights="nf4", stream=5)
    assert decoder_of(model).streaming.slots[0].nbytes == streamed_bytes(CONFIG, "nf4", torch.float32)


def test_more_layers_than_there_are() -> None:
    for streamed in (-1, LAYERS + 1):
        with pytest.raises(ValueError, match="expected 0 to 5"):
            fuse(adapted_model(CONFIG), stream=streamed)


def test_host_memory_has_no_name_and_goes_with_its_last_user() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(host.NAME)

    before = mapped()
    memory = HostMemory(3 * 4096 + 5, torch.device("cpu"), Alone())
    assert (memory.rank, memory.ranks) == (0, 1)
    memory.bytes.fill_(7)
    assert mapped() == before + 1
    del memory
    assert mapped() == before


def test_the_least_of_all_limits_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert available()[1] == "/proc/meminfo" or "memory.max" in available()[1]
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    (tmp_path / "proc" / "cgroup").write_text("0::/job/step\n")
    job = tmp_path / "cgroup" / "job"
    (job / "step").mkdir(parents=True)
    (job / "step" / "memory.max").write_text("max\n")
    for name, text in (("max", "20480\n"), ("current", "10240\n"), ("stat", "anon 1\ninactive_file 1024\n")):
        (job / f"memory.{name}").write_text(text)
    places = {
        "/proc/meminfo": tmp_path / "proc" / "meminfo",
        "/proc/self/cgroup": tmp_path / "proc" / "cgroup",
    }
    places["/sys/fs/cgroup"] = tmp_path / "cgroup"
    monkeypatch.setattr(host, "Path", lambda name: places.get(str(name), Path(name)))
    assert available() == (20480 - 9216, str(job / "memory.max"))


gpu = pytest.mark.skipif(not GPU, reason="no GPU")
SEVERAL = [[Segment(9, 4, 3)], [Segment(9, 4, 3)], [Segment(5, 2, 3), Segment(7, 3, 3)], [Segment(9, 4, 3)]]


@gpu
@pytest.mark.parametrize("replays", [True, False], ids=["replayed", "plain"])
@pytest.mark.parametrize("streamed", [1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMS_HERE)
def test_on_a_gpu_streaming_changes_no_bit(form: str, streamed: int, replays: bool) -> None:
    """With graphs and without; drawing in between, and a graph captured after it."""
    model, same = (adapted_model(CONFIG, torch.bfloat16) for _ in range(2))
    fuse(model, weights=form, stream=streamed)
    plain = resident(same, form, "everything", streamed)
    graphs = decoder_of(model).graphs
    assert plain.graphs and graphs
    plain.graphs._enabled, graphs._enabled = False, replays
    cases = [in_bfloat16(Case(CONFIG, segments, seed)) for seed, segments in enumerate(SEVERAL)]
    assert_same_steps(model, same, cases)
    assert torch.equal(drawn(model, cases[2]), drawn(same, cases[2]))
    assert_same_steps(model, same, list(reversed(cases)))
    assert len(graphs.captured) == (2 if replays else 0)


def in_bfloat16(case: Case) -> Case:
    case.text, case.z = case.text.bfloat16(), case.z.bfloat16()
    return case


@gpu
@pytest.mark.parametrize("keep", list(KEPT))
def test_at_the_real_shapes_copies_overlap_and_change_no_bit(keep: str) -> None:
    """Blocks of 0.4 GB take long enough that a wait that is missing shows."""
    config = replace(REAL, num_hidden_layers=6)
    model, same = adapted_model(config, torch.bfloat16), adapted_model(config, torch.bfloat16)
    fuse(model, keep=keep, stream=6)
    scratch = Scratch()
    fuse_with(same, partial(STREAMED["full"], scratch=scratch), keep).graphs = None
    case = in_bfloat16(Case(config, [Segment(20, 8, 8)]))
    assert_same_steps(model, same, [case] * 4)


@gpu
def test_host_memory_is_page_locked_until_it_is_let_go() -> None:
    memory = HostMemory(1 << 20, torch.device("cuda"), Alone())
    view = memory.bytes[100:]
    assert view.is_pinned()
    del memory
    assert not view.is_pinned()
