"""The plan's bytes against the tensors there are, its choice against all choices, and both against a GPU."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hdl.config import Lora, Model, Train
from hdl.engine.budget import mean_ranks
from hdl.kernels import layer as layers
from hdl.kernels.fuse import FORMS as PACKED
from hdl.kernels.fuse import flatten, fuse
from hdl.kernels.graphs import Graphs
from hdl.kernels.layer import KEPT, packs
from hdl.kernels.linears import PackedLinear
from hdl.kernels.scratch import Scratch
from hdl.memory import plan
from hdl.memory.offload import Offload, Things
from hdl.memory.plan import FORMS, GIB, GPUS, Strategy, Work, mix, need, step_ms
from hdl.o1.config import read_config
from hdl.o1.layout import Segment
from tests.kernels.test_fused import SMALL, UNEVEN, Case, adapted_model
from tests.memory.test_offload import MIXED_LEVELS

REPOSITORY = Path(__file__).parents[2]
REAL = read_config(REPOSITORY / "tests/o1/o1-8b-config.json")
SEGMENTS = [Segment(5, 2, 3), Segment(9, 3, 1)]
RANK = 4


CACHED = [thing for thing in vars(plan).values() if hasattr(thing, "cache_clear")]


@pytest.fixture(autouse=True)
def float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(plan, "B16", 4)  # what is counted here is in float32
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "B16", 2)
    for cached in CACHED:
        cached.cache_clear()


def bytes_of(things: Any, seen: set[int]) -> int:
    """Of all memory behind the tensors in there, each piece once."""
    if isinstance(things, Tensor):
        storage = things.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(things, dict):
        return sum(bytes_of(thing, seen) for thing in things.values())
    if isinstance(things, list | tuple):
        return sum(bytes_of(thing, seen) for thing in things)
    return bytes_of(vars(things), seen) if hasattr(things, "__dict__") else 0


@pytest.mark.parametrize("level", list(KEPT))
def test_what_a_layer_keeps_is_what_was_counted(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    keep = layers.Made.kept

    def counted(self: layers.Made, names: frozenset[str]) -> dict[str, Any]:
        things = keep(self, names)
        kept.append(bytes_of(things, set()))
        return things

    monkeypatch.setattr(layers.Made, "kept", counted)
    monkeypatch.setattr(Graphs, "__call__", lambda *_: None)  # a rehearsal keeps things, too
    model = adapted_model(SMALL)
    fuse(model, keep=level)
    Case(SMALL, SEGMENTS).run(model)
    work = Work.of(SEGMENTS)
    expected = plan.kept_bytes(SMALL, RANK, work, level)
    if level != "input":  # PyTorch's attention keeps nothing of its own, cuDNN's a number a head
        expected -= plan.F32 * SMALL.num_attention_heads * work.tokens
    assert kept == [expected] * SMALL.num_hidden_layers


@pytest.mark.parametrize("weights", [form for form in FORMS if form != "nf4"])
def test_what_a_pack_holds_is_what_was_counted(weights: str) -> None:
    model = adapted_model(SMALL)
    layer = model.get_base_model().model.language_model.layers[0]  # type: ignore[union-attr,operator]
    for modules, pack in zip(packs(layer), plan.packs(SMALL, RANK).values(), strict=True):
        scratch = Scratch()
        linear: PackedLinear = PACKED[weights](modules, scratch=scratch)
        assert (linear.n, linear.k, linear.r) == (pack.n, pack.k, pack.r)
        tensors = {name: thing for name, thing in vars(linear).items() if name not in ("members", "scratch")}
        assert bytes_of(tensors, set()) == plan.pack_bytes(pack, weights)


def test_nf4_takes_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size where what is rounded up in its scales counts for little."""
    in_bfloat16(monkeypatch)
    weight = torch.randn(512, 1024).bfloat16()
    from bitsandbytes.functional import quantize_4bit

    values, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = bytes_of([values, state.absmax, state.state2.absmax], set())
    assert held == pytest.approx(plan.pack_bytes(plan.Pack(512, 1024, 0), "nf4"), rel=1e-3)


@pytest.mark.parametrize("level", list(KEPT))
def test_e4m3_copies_go_as_soon_as_they_are_read(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and in what backward makes anew: nobody reads one twice, and the plan counts none."""
    made: list[tuple[layers.Made, set[str]]] = []  # with what was kept for it
    plain = layers.Made.__init__

    def remembered(self: layers.Made, *arguments: Any) -> None:
        plain(self, *arguments)
        made.append((self, set(self.things)))

    monkeypatch.setattr(layers.Made, "__init__", remembered)
    monkeypatch.setattr(layers.Made, "drop", lambda self, name: None)
    monkeypatch.setattr(Graphs, "__call__", lambda *_: None)
    model = adapted_model(SMALL)
    fuse(model, weights="fp8_once", keep=level)
    Case(SMALL, SEGMENTS).run(model)
    products = {"qkv_in": "qkv", "o_in": "x1", "gate_up_in": "gate_up", "down_in": "out"}
    read = [
        m.things[name]
        for m, kept in made
        for name, result in products.items()
        if result in m.things and result not in kept
    ]
    assert len(made) == 2 * SMALL.num_hidden_layers and len(read) >= 4 * SMALL.num_hidden_layers
    assert all(buffer.wide_rows is None for buffer in read)


def test_the_adapters_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(SMALL)
    flatten(model)
    assert plan.adapter_numbers(SMALL, RANK) == model.flat_adapter.numel()  # type: ignore[operator,union-attr]
    assert plan.adapter_numbers(REAL, 32) == 87_293_952


def test_ranks_that_differ_by_layer_are_counted() -> None:
    """The adapter to the number; what a layer keeps on average, ranks being padded to multiples of 8."""
    ranks = mean_ranks(UNEVEN, SMALL)
    model = adapted_model(SMALL, lora=UNEVEN)
    flatten(model)
    assert plan.adapter_numbers(SMALL, ranks) == model.flat_adapter.numel()  # type: ignore[operator,union-attr]
    assert mean_ranks(Lora(rank=RANK), SMALL) == plan.Ranks(*[RANK] * 7)
    layers_of = model.get_base_model().model.language_model.layers  # type: ignore[union-attr,operator]
    held = [[PACKED["full"](m, scratch=Scratch()) for m in packs(layer)] for layer in layers_of]
    for i, pack in enumerate(plan.packs(SMALL, ranks).values()):
        mean = sum(of[i].r for of in held) / len(held)
        assert pack.r - 8 < mean < pack.r + 8


@pytest.mark.parametrize("gib", [1.2, 1.5, 1.8, 2.2, 2.6, 3.0])
def test_the_best_mix_is_close_to_the_best_of_all_mixes(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    config, work, gpu = replace(REAL, num_hidden_layers=5), Work.of_images(1024, 1024, 2, 160), GPUS["h100"]
    memory = need(config, 32, work, Strategy("fp8_once", ("input",) * 5)).peak + (gib - 1.5) * GIB
    within = [
        (step_ms(config, 32, work, strategy, gpu), keep)
        for keep in product(KEPT, repeat=5)
        if need(config, 32, work, strategy := Strategy("fp8_once", keep)).peak <= memory
    ]
    chosen = plan.plan(config, 32, work, "fp8_once", "adamw", 1, memory, gpu, host=plan.Host(0))
    assert (chosen is None) == (not within)
    if chosen is not None:
        assert need(config, 32, work, chosen).peak <= memory
        # Three levels at once could use up what there is better, by less than one layer's worth.
        most = max(plan.remade_ms(config, 32, work, level, "fp8_once", gpu) for level in KEPT)
        assert min(within)[0] <= step_ms(config, 32, work, chosen, gpu) <= min(within)[0] + most


def test_what_layers_make_anew_is_counted_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """While all is kept, if they are the last; when what the last ones kept has been let go, if they are the first."""
    in_bfloat16(monkeypatch)
    work = Work.of_images(2048, 2048, 1, 160)
    mixed = ["input"] * 18 + ["everything"] * 18
    lean_first, lean_last = (
        need(REAL, 32, work, Strategy("fp8_once", tuple(keep))) for keep in (mixed, mixed[::-1])
    )
    more = plan.kept_bytes(REAL, 32, work, "everything") - plan.kept_bytes(REAL, 32, work, "input")
    assert lean_first.activations == lean_last.activations
    assert lean_last.workspace - lean_first.workspace == more


# On H100s, nothing recomputed: GiB reserved, and ms a step. docs/measurements.md, 2026-11-25 (full) and 2026-11-26.
MEASURED = [
    ("full", (1024, 1024, 1), 20.9, 74.1),
    ("full", (1024, 1024, 4), 37.8, 266.3),
    ("full", (2048, 2048, 1), 36.0, 300.1),
    ("fp8_once", (1024, 1024, 1), 15.17, 64.6),
    ("fp8_once", (1024, 1024, 4), 32.17, 188.3),
    ("fp8_once", (2048, 2048, 1), 30.37, 227.3),
    ("nf4", (1024, 1024, 1), 11.58, 95.0),
]


@pytest.mark.parametrize(("weights", "images", "gib", "ms"), MEASURED)
def test_predictions_agree_with_what_was_measured(
    weights: str, images: tuple[int, int, int], gib: float, ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bfloat16(monkeypatch)
    work = Work.of_images(*images, text=160)
    strategy = Strategy(weights, ("everything",) * 36)
    # Rather too much than too little: room for holes among activations is counted, and not all have them.
    assert 0.985 * gib < need(REAL, 32, work, strategy).peak / GIB < 1.04 * gib
    assert step_ms(REAL, 32, work, strategy, GPUS["h100"]) == pytest.approx(ms, rel=0.1)


def levels(**counts: int) -> tuple[str, ...]:
    return tuple(level for level, count in counts.items() for _ in range(count))


# tools/cards.py on an H100 whose allocator was held to the card less 1 GiB, 2026-11-26: GiB reserved at most.
CAPPED = [
    (2048, Strategy("fp8_once", levels(products=36)), 22.98),
    (2048, Strategy("fp8_once", levels(products=3, attention=33)), 14.78),
    (1024, Strategy("fp8_once", levels(products=2, attention=34)), 10.92),
    (2048, Strategy("fp8_once", levels(attention=36), offload=36), 10.87),
    (1024, Strategy("nf4", levels(products=25, attention=11), stream=24), 6.87),
]


@pytest.mark.parametrize(("side", "strategy", "gib"), CAPPED)
def test_predictions_agree_with_what_small_cards_took(
    side: int, strategy: Strategy, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bfloat16(monkeypatch)
    work = Work.of_images(side, side, 1, text=160)
    assert need(REAL, 32, work, strategy).peak / GIB == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("card", [8, 12, 16, 24, 48])
def test_a_plan_fits_its_card_and_leaves_little_of_it(card: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    work = Work.of_images(1024, 1024, 1, text=160)
    memory = (card - 1) * GIB
    found = plan.choices(REAL, 32, work, "adamw_8bit", 1, memory, GPUS["h100"])
    fitting = [c for c in found if c.strategy]
    assert fitting and found[: len(fitting)] == fitting
    for choice in fitting:
        assert choice.strategy and choice.need.peak <= memory
        if set(choice.strategy.keep) != {"everything"}:
            assert choice.need.peak > 0.9 * memory
    for choice in found[len(fitting) :]:
        assert choice.need.peak > memory


def test_words_for_a_mix() -> None:
    assert mix(("everything", "input", "everything")) == "everything x 2, input x 1"


@pytest.mark.parametrize("count", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("levels", [["products"] * 6, MIXED_LEVELS], ids=["alike", "mixed"])
def test_what_offloading_leaves_on_the_gpu(
    levels: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted while steps are taken: layers' things by when they are there, and bytes that are copied."""
    config = replace(SMALL, num_hidden_layers=6)
    work = Work.of(SEGMENTS)
    model = adapted_model(config)
    fuse(model, keep=levels, offload=count)
    here = most = sent = 0

    def come(size: int) -> None:
        nonlocal here, most
        here += size
        most = max(most, here)

    class Counted(layers.InPlace):
        """Beside the layer's own keeper."""

        def __init__(self, keeper: Any) -> None:
            self.keeper = keeper

        def make_room(self) -> None:
            nonlocal here
            offload = getattr(self.keeper, "offload", None)
            before = set(offload._leaving) if offload else set()
            self.keeper.make_room()
            here -= sum(things_of[j] for j in before - set(offload._leaving if offload else ()))

        def put(self, things: Things) -> Any:
            size = counted_as(things)
            come(size)
            things_of[getattr(self.keeper, "j", None)] = size
            return Taken(self.keeper.put(things), size)

    class Taken:
        def __init__(self, kept: Any, size: int) -> None:
            self.kept, self.size = kept, size

        def take(self) -> Things:
            return self.kept.take()

        def done(self) -> None:
            nonlocal here
            here -= self.size
            before = set(decoder.offload._coming)
            self.kept.done()
            for j in set(decoder.offload._coming) - before:
                come(things_of[j])

    def counted_as(things: Things) -> int:
        """With the numbers that cuDNN's attention keeps and PyTorch's does not."""
        extra = plan.F32 * config.num_attention_heads * work.tokens if "o_in" in things else 0
        return bytes_of(things, set()) + extra

    send = Offload.send

    def counted_send(self: Offload, j: int, things: Things) -> None:
        nonlocal sent
        sent += counted_as(things)
        send(self, j, things)

    monkeypatch.setattr(Offload, "send", counted_send)
    decoder = model.get_submodule("base_model.model.model.language_model").forward.__self__  # type: ignore[union-attr]
    things_of: dict[Any, int] = {}
    for layer in decoder.layers:
        layer.keeper = Counted(layer.keeper)
    Case(config, SEGMENTS).run(model)
    assert here == 0
    sizes = [plan.kept_bytes(config, RANK, work, level) for level in levels]
    assert most == plan.held_bytes(sizes, count, [0] * len(sizes))[0] <= sum(sizes)
    assert sent == plan.sent_bytes(sizes, count)
    needs = [need(config, RANK, work, Strategy("full", tuple(levels), offload=n)) for n in (count, 0)]
    fewer = (sum(sizes) - most) * (1 + plan.FRAGMENTS)
    assert needs[1].activations - needs[0].activations == pytest.approx(fewer, abs=1)
    assert needs[0].activations_on_host == sent and needs[1].activations_on_host == 0


def test_what_is_hidden_costs_nothing_and_the_rest_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    work, gpu = Work.of_images(2048, 2048, 1, text=160), GPUS["h100"]

    def ms(gpu: plan.Gpu = gpu, **settings: Any) -> float:
        return step_ms(REAL, 32, work, Strategy("fp8", ("products",) * 36, **settings), gpu)

    assert ms(offload=8) == ms()
    slow = replace(gpu, host=gpu.host / 4)
    assert ms(slow, offload=8) > ms(), "2 GB of products in 60 ms are more than 14 GB/s"
    sent = plan.sent_bytes([plan.kept_bytes(REAL, 32, work, "products")] * 36, 36)
    assert ms(offload=36) > 2e3 * sent / (gpu.host * 1e9) > ms()
    # A forward pass waits for as many streamed weights as a backward pass, in half of its time.
    block = sum(plan.block_bytes(pack, "fp8") for pack in plan.packs(REAL, 32).values())
    copied = 1e3 * 34 * block / (gpu.host * 1e9)
    assert ms(stream=36) > ms() + 0.3 * copied and ms(stream=36) > 2 * copied


def test_the_hosts_memory_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    work = Work.of_images(2048, 2048, 1, text=160)

    def best(host: plan.Host) -> plan.Choice:
        return plan.choices(REAL, 32, work, "adamw", 1, 11 * GIB, GPUS["h100"], host)[0]

    free, bound, shared = (
        best(plan.Host(*host)) for host in ((float("inf"), 1), (3 * GIB, 1), (20 * GIB, 8))
    )
    assert free.strategy and bound.strategy and shared.strategy
    assert free.need.on_host() > 3 * GIB >= bound.need.on_host() and bound.ms > free.ms
    assert shared.need.on_host(8) <= 20 * GIB, "each of 8 GPUs sends its own activations"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_tool_writes_a_preset_that_a_run_takes(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    ran = run_tool("--card", "16", "--size", "2048x2048", "--write", str(preset))
    assert ran.returncode == 0, ran.stderr
    written = tomllib.loads(preset.read_text())
    model = Model(base=Path("base"), **written["model"])
    assert model.weights in FORMS and len(model.keep) == 36
    assert Train(**written["train"]).optimizer == "adamw"
    first = next(line for line in ran.stdout.splitlines() if line.startswith(f"| {model.weights} |"))
    assert float(first.split("|")[9]) <= 15.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--card", "3"), "nothing fits 3 GiB: nf4"),
        (("--card", "24", "--size", "1000x1000"), "--size 1000x1000: expected WIDTHxHEIGHT"),
        (("--card", "0.5"), "expected more than 1 GiB"),
        (("--card", "6", "--host", "1"), "nothing fits 6 GiB without the host's memory: nf4"),
        (
            ("--card", "24", "--write", "/no folder/preset.toml"),
            "--write /no folder/preset.toml: cannot be written",
        ),
    ],
)
def test_the_tool_says_what_cannot_be(arguments: tuple[str, ...], said: str) -> None:
    ran = run_tool(*arguments)
    assert ran.returncode != 0 and said in ran.stderr and "Traceback" not in ran.stderr
