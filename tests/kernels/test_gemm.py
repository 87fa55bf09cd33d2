"""Products against float64, and the choice of an algorithm without a GPU."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from hdl.kernels import cublaslt, gemm
from hdl.kernels.cublaslt import Candidate
from hdl.kernels.gemm import Family, choose, predicted_ms, race, wants_race
from hdl.kernels.quantize import Rowwise, empty_rows, quantize_rows
from tests.kernels.helpers import DEVICE, distance

GPU = torch.cuda.is_available()
FP8 = not GPU or torch.cuda.get_device_capability() >= (8, 9)
# Every result is a float64 one rounded once, so no further away than the dtype's unit roundoff; float32's sum
# has a rounding a step.
BOUND = {torch.bfloat16: 2**-8, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Every test starts with nothing measured, and forgets what it learned about made-up algorithms."""
    gemm._plans.clear()
    gemm._families.clear()
    yield
    gemm._plans.clear()
    gemm._families.clear()


def columns_of_wider(rows: int, columns: int, dtype: torch.dtype, seed: int, left: int = 8) -> Tensor:
    """Random columns of a buffer that is nan left and right of them."""
    wide = torch.full((rows, left + columns + 24), math.nan, dtype=dtype, device=DEVICE)
    inside = wide[:, left : left + columns]
    generator = torch.Generator().manual_seed(seed)
    return inside.copy_(torch.randn(rows, columns, generator=generator))


def untouched(inside: Tensor, left: int = 8) -> bool:
    wide = inside._base
    assert wide is not None
    return bool(wide[:, :left].isnan().all() and wide[:, left + inside.shape[1] :].isnan().all())


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(
    "M, N, K",
    [(1, 48, 64), (5, 24, 136), (37, 264, 8), (129, 8, 520), (300, 1000, 768), (11, 7, 13), (1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("added", ["nothing", "another matrix", "out itself"])
def test_products(transposed: bool, dtype: torch.dtype, M: int, N: int, K: int, added: str) -> None:
    inner, outer = (N, K) if transposed else (K, N)
    x, w = columns_of_wider(M, inner, dtype, 0), columns_of_wider(N, K, dtype, 1)
    out = columns_of_wider(M, outer, dtype, 2, left=16)
    plus = {"nothing": None, "another matrix": columns_of_wider(M, outer, dtype, 3), "out itself": out}[added]
    want = x.double() @ (w.double() if transposed else w.double().t())
    if plus is not None:
        want += plus.double()
    function = gemm.product_transposed if transposed else gemm.product
    made = None if plus is out else function(x, w, plus=plus)
    assert function(x, w, out=out, plus=plus) is out
    assert distance(out, want) < BOUND[dtype]
    assert untouched(out, left=16)
    if made is not None:
        assert made.dtype == dtype and made.is_contiguous()
        assert distance(made, want) < BOUND[dtype]


def test_no_rows() -> None:
    x, w = torch.empty(0, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    assert gemm.product(x.bfloat16(), w.bfloat16()).shape == (0, 8)


def test_rows_that_are_not_aligned() -> None:
    """Of no use to cuBLASLt, and as right as any."""
    x, w = columns_of_wider(33, 40, torch.bfloat16, 0, left=1), columns_of_wider(16, 40, torch.bfloat16, 1)
    assert distance(gemm.product(x, w), x.double() @ w.double().t()) < 2**-8
    strided = torch.randn(40, 33, device=DEVICE).bfloat16().t()
    assert distance(gemm.product(strided, w), strided.double() @ w.double().t()) < 2**-8


def random_rows(rows: int, columns: int, seed: int) -> Rowwise:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, rows)[:, None]  # as far apart as channels are
    values = (100 * torch.randn(rows, columns, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Rowwise(values.to(DEVICE), sizes[:, 0].to(DEVICE))


@pytest.mark.skipif(not FP8, reason="no fp8 arithmetic before sm_89")
@pytest.mark.parametrize("M, N, K", [(1, 48, 64), (5, 16, 144), (37, 272, 32), (300, 1008, 768)], ids=str)
@pytest.mark.parametrize("added", ["nothing", "another matrix", "out itself"])
def test_fp8(M: int, N: int, K: int, added: str) -> None:
    x, w = random_rows(M, K, 0), random_rows(N, K, 1)
    want = x.dequantize().double() @ w.dequantize().double().t()
    size = float(want.abs().mean())  # of what is added, so that it would be missed
    out = columns_of_wider(M, N, torch.bfloat16, 2).mul_(size)
    other = columns_of_wider(M, N, torch.bfloat16, 3).mul_(size)
    plus = {"nothing": None, "another matrix": other, "out itself": out}[added]
    if plus is not None:
        want += plus.double()
    results = [] if plus is out else [gemm.product_rows_fp8(x, w, plus=plus)]
    assert gemm.product_rows_fp8(x, w, out=out, plus=plus) is out
    assert untouched(out)
    # Fast accumulation keeps few bits, and where plus cannot be added in the product it is rounded twice.
    bound = 2**-7 if GPU else 2**-8
    for result in [*results, out]:
        assert result.dtype == torch.bfloat16
        assert distance(result, want) < bound
        rows = (result.double() - want).norm(dim=1) / want.norm(dim=1)
        assert rows.max() < bound  # each is as exact as the others, whatever its scale


def test_fp8_in_float32() -> None:
    x, w = random_rows(9, 48, 0), random_rows(16, 48, 1)
    want = x.dequantize().double() @ w.dequantize().double().t()
    plus = torch.randn(9, 16, device=DEVICE)
    assert distance(gemm.product_rows_fp8(x, w, plus=plus), want + plus.double()) < 1e-6
    assert distance(gemm.product_rows_fp8(x, w, out=torch.empty_like(plus)), want) < 1e-6


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_says_what_does_not_fit(dtype: torch.dtype) -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    x, w = zeros(4, 16), zeros(8, 16)
    with pytest.raises(ValueError, match=r"\[M, 16\]"):
        gemm.product(zeros(4, 8), w)
    with pytest.raises(ValueError, match=r"\[M, 8\]"):
        gemm.product_transposed(x, w)
    with pytest.raises(ValueError, match=r"out is .*expected .*\[4, 8\]"):
        gemm.product(x, w, out=zeros(4, 16))
    with pytest.raises(ValueError, match="plus is"):
        gemm.product(x, w, plus=zeros(1, 8))
    with pytest.raises(ValueError, match="float16"):
        gemm.product(x, w, plus=zeros(4, 8).half())
    with pytest.raises(ValueError, match="float16"):
        gemm.product(x, w.half())
    wide = Rowwise(empty_rows(4, 16, DEVICE).values, torch.ones(16, device=DEVICE))
    with pytest.raises(ValueError, match=r"x\.scale"):
        gemm.product_rows_fp8(wide, empty_rows(16, 16, DEVICE))


# ---- the choice


def candidate(name: int, waves: float) -> Candidate:
    return Candidate((name,), waves, f"algorithm {name}")


def test_prediction_counts_whole_waves() -> None:
    assert predicted_ms(8.97, [(8.97, 0.9)]) == pytest.approx(0.9)
    assert predicted_ms(9.0000005, [(8.97, 0.9)]) == pytest.approx(0.9)
    assert predicted_ms(9.03, [(8.97, 0.9)]) == pytest.approx(1.0)
    assert predicted_ms(0.3, [(0.9, 0.2)]) == pytest.approx(0.2)
    assert predicted_ms(4.5, [(20.0, 20.0), (3.5, 6.0)]) == pytest.approx(7.5)  # by the nearest


def test_chooses_by_whole_waves_times_time_a_wave() -> None:
    times = {(1,): [(9.0, 0.9)], (2,): [(4.5, 1.0)]}  # 0.1 and 0.2 ms a wave
    assert choose([candidate(1, 9.1), candidate(2, 4.6)], times).config == (1,)  # 1.0 against 1.0: as listed
    assert choose([candidate(1, 9.1), candidate(2, 3.9)], times).config == (2,)  # 1.0 against 0.8
    assert choose([candidate(1, 8.0), candidate(2, 4.1)], times).config == (1,)  # 0.8 against 1.0
    assert choose([candidate(3, 1.0), candidate(2, 9.0)], times).config == (2,)  # nothing is known of 3
    assert choose([candidate(4, 1.0), candidate(3, 1.0)], times).config == (4,)  # nothing is known at all


def test_races_only_for_the_unknown_and_far_enough_away() -> None:
    known, unknown = [candidate(1, 2.0)], [candidate(1, 2.0), candidate(2, 2.0)]
    family = Family()
    assert wants_race(known, family, 1000)
    family.enter(1000, known, {0: 1.0})
    assert not wants_race(known, family, 9000)
    assert not wants_race(unknown, family, 1290) and not wants_race(unknown, family, 780)
    assert wants_race(unknown, family, 1310) and wants_race(unknown, family, 760)
    for M in (2000, 4000, 8000):
        assert wants_race(unknown, family, M)
        family.enter(M, known, {0: 1.0})
    assert not wants_race(unknown, family, 100_000)
    nowhere = Family()
    nowhere.enter(1000, known, {})  # had no room to run
    assert wants_race(known, nowhere, 1000)


class Stopwatch:
    """Laps of made-up candidates: `ms` when all is well, the first run of each a hundred times slower."""

    def __init__(self, ms: Sequence[float], noise: float = 0.0) -> None:
        self.ms, self.noise, self.spent = ms, noise, 0.0
        self.runs = [0] * len(ms)

    def lap(self, entrants: Sequence[int], repeats: int) -> list[float]:
        times = []
        for i in entrants:
            late = 1 + self.noise * ((7 * self.runs[i] + 3 * i) % 5) / 4
            times.append(self.ms[i] * (late if self.runs[i] else 100))
            self.spent += self.ms[i] * repeats if self.ms[i] < math.inf else 0.0
            self.runs[i] += repeats
        return times


def test_race_finds_the_fastest_within_its_budget() -> None:
    watch = Stopwatch([1.0, 0.7, 0.9, 0.72, 2.0], noise=0.3)
    best = race(5, watch.lap, 30.0)
    assert min(best, key=best.__getitem__) == 1
    assert best[1] == pytest.approx(0.7, rel=0.05)
    assert watch.spent <= 30.0
    assert watch.runs[4] == 2  # warm-up and one lap: clearly behind


@pytest.mark.parametrize("ms", [0.005, 0.05, 0.4, 1.4, 3.0])
def test_race_stays_within_its_budget(ms: float) -> None:
    watch = Stopwatch([ms] * 16)
    best = race(16, watch.lap, 30.0)
    assert 2 <= len(best) <= 16
    assert watch.spent <= 31.0
    assert list(best.values()) == pytest.approx([ms] * len(best))


def test_race_leaves_out_who_refuses() -> None:
    assert race(3, Stopwatch([1.0, math.inf, 0.5]).lap) == pytest.approx({0: 1.0, 2: 0.5})
    assert race(3, Stopwatch([math.inf, 1.0, 0.5]).lap) == pytest.approx({1: 1.0, 2: 0.5})
    assert race(2, Stopwatch([math.inf, math.inf]).lap) == {}
    assert race(1, Stopwatch([1.0]).lap) == pytest.approx({0: 1.0})


class Described:
    """Stands in for cublaslt.Product: two algorithms, of 128 and 200 rows a wave."""

    alive = 0
    ran: object = None
    refused: object = None

    def __init__(self, x: Tensor, *_: object) -> None:
        Described.alive += 1
        self.M = x.shape[0]

    def run(self, algorithm: object, *_: object) -> None:
        if algorithm == Described.refused:
            raise cublaslt.UnsupportedError
        Described.ran = algorithm

    def candidates(self, count: int, alignment: int) -> list[Candidate]:
        return [candidate(1, self.M / 128), candidate(2, self.M / 200)]

    def free(self) -> None:
        Described.alive -= 1


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The M of every race of a made-up library."""
    ran: list[int] = []

    def fake_race(described: Described, candidates: Sequence[Candidate], *_: object) -> dict[int, float]:
        ran.append(described.M)
        return {0: math.ceil(described.M / 128) * 1.0, 1: math.ceil(described.M / 200) * 1.5}

    Described.alive, Described.refused = 0, None
    monkeypatch.setattr(cublaslt, "library", object)
    monkeypatch.setattr(cublaslt, "Product", Described)
    monkeypatch.setattr(gemm, "_race", fake_race)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ran


MADE_UP = torch.empty(4000, 32, dtype=torch.bfloat16)


def algorithm(M: int) -> object:
    """Which one computes a product of M rows; None for PyTorch."""
    x, w, out = MADE_UP[:M, :16], MADE_UP[:32, :16], MADE_UP[:M, :32]  # the same addresses for every M
    taken = gemm._through_library(x, w, out, None, False, None)
    return Described.ran if taken else None


def test_a_stream_of_new_sizes_races_once(races: list[int]) -> None:
    for M in (1000, 1001, 1000, 200, 250, 4000):
        tall, wide = math.ceil(M / 200) * 1.5, math.ceil(M / 128)
        assert algorithm(M) == ("algorithm 2" if tall < wide else "algorithm 1"), M
    assert races == [1000]


def test_the_first_guess_without_measuring(races: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert algorithm(200) == "algorithm 2"
    monkeypatch.setattr(gemm, "measure", False)
    assert algorithm(200) == "algorithm 1"  # whatever was measured before
    monkeypatch.setattr(gemm, "measure", True)
    assert algorithm(200) == "algorithm 2"
    assert races == [200]


def test_no_race_during_capture(races: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert algorithm(200) == algorithm(200) == "algorithm 1"
    assert races == [] and Described.alive == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert algorithm(200) == "algorithm 2"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert algorithm(200) == algorithm(400) == "algorithm 2"
    assert races == [200]


def test_keeps_a_bounded_number_of_plans(races: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "MAX_PLANS", 3)
    for M in range(100, 110):
        algorithm(M)
    assert Described.alive == len(gemm._plans) == 3


def test_pytorch_does_what_the_library_refuses(races: list[int]) -> None:
    Described.refused = "algorithm 2"
    assert algorithm(200) is None and algorithm(200) is None
    assert races == [200] and Described.alive == 0


# ---- the library itself


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_measures_once_and_the_winner_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    raced = []
    real = gemm._race

    def counted(described: cublaslt.Product, *rest: object) -> dict[int, float]:
        raced.append(described.shape)
        return real(described, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gemm, "_race", counted)
    w = columns_of_wider(1024, 512, torch.bfloat16, 1)
    for M in (500, 500, 501, 600):
        x = columns_of_wider(M, 512, torch.bfloat16, M)
        y = columns_of_wider(M, 1024, torch.bfloat16, 2)
        want = y.double() + x.double() @ w.double().t()
        assert distance(gemm.product(x, w, out=y, plus=y), want) < 2**-8
        assert untouched(y)
    assert len(raced) == 1


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_can_be_captured_before_anything_was_measured() -> None:
    x, w = columns_of_wider(200, 512, torch.bfloat16, 0), columns_of_wider(256, 512, torch.bfloat16, 1)
    out = torch.zeros(200, 256, dtype=torch.bfloat16, device=DEVICE)
    warm = gemm.product(x, w[:128])  # the handle and the workspace are there, this family is not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm.product(x, w, out=out)
    graph.replay()
    want = x.double() @ w.double().t()
    assert distance(out, want) < 2**-8 and distance(warm, want[:, :128]) < 2**-8


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_bit_for_bit_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "measure", False)
    x, w = columns_of_wider(777, 512, torch.bfloat16, 0), columns_of_wider(256, 512, torch.bfloat16, 1)
    first = gemm.product(x, w)
    gemm._plans.clear()
    assert torch.equal(gemm.product(x, w), first)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = columns_of_wider(65, 512, torch.bfloat16, 0), columns_of_wider(256, 512, torch.bfloat16, 1)
    with_library = gemm.product(x, w)
    gemm._plans.clear()
    monkeypatch.setattr(cublaslt, "library", lambda: None)
    assert distance(gemm.product(x, w), with_library.double()) < 2**-7  # both rounded
    if FP8:
        rows, weight = quantize_rows(x), quantize_rows(w)
        want = rows.dequantize().double() @ weight.dequantize().double().t()
        assert distance(gemm.product_rows_fp8(rows, weight), want) < 2**-7
