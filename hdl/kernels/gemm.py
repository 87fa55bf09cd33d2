"""The decoder's matrix products, with the algorithm of each chosen by measurement.

    product               out = x w^T (+ plus)      x [M, K], w [N, K]: forward
    product_transposed    out = x w   (+ plus)      x [M, N], w [N, K]: backward, over the same stored w
    product_rows_fp8      product of e4m3 matrices, scaled row by row on both sides

bfloat16 and e4m3 on a GPU go to cuBLASLt, sums in float32, rounded once; everything else, and what the
library does not take, goes to PyTorch. No autograd.

cuBLASLt offers several algorithms for a product and guesses which is fastest. The guess costs 5 to 15 % at
our sizes, because a GPU works in waves: 132 tiles at a time on an H200, and a last wave of three tiles takes
as long as a full one. So the first time a product is met, its candidates race each other. Their times are
kept for its family, that is all products that differ from it in M alone, as time a wave, and for any other M

    predicted time = ceil(waves at this M) * time / ceil(waves at the M it was measured at)

picks the winner without measuring, so that a stream of ever new M races only a few times in all (`RATIO`,
`MAX_RACES`). A race takes about `BUDGET_MS` of the step that it happens in; there is none while a CUDA graph
is captured.

Which of two nearly equal candidates wins may differ from run to run, and with it the order of sums. With
`hdl.kernels.gemm.measure = False` the library's first guess is taken, always the same for the same sizes.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hdl.kernels import cublaslt
from hdl.kernels.cublaslt import Candidate, Scales
from hdl.kernels.quantize import Rowwise

measure = True

CANDIDATES = 16
RATIO = 1.3  # a family is measured anew only at an M that much above or below all before
MAX_RACES = 4  # a family
BUDGET_MS = 30.0  # GPU time of a race
LAP_MS = 0.2  # shorter products are repeated to fill that, or launching would be what is measured
MAX_LAPS = 5
CLOSE = 1.05  # who takes longer than that many times the best drops out of a race
MAX_PLANS = 4096

Config = tuple[int, ...]


def product(x: Tensor, w: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """x w^T (+ plus), [M, N].

    x: [M, K]; w: [N, K]; out: what to fill; plus: [M, N], may be out itself, else the two must not overlap.
    All of one dtype, any strides; fast if rows are 16-byte aligned with adjacent elements. ValueError for
    shapes or dtypes that do not fit.
    """
    return _dense(x, w, out, plus, transposed=False)


def product_transposed(
    x: Tensor, w: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """x w (+ plus), [M, K]; x: [M, N]; w: [N, K]. Otherwise like `product`."""
    return _dense(x, w, out, plus, transposed=True)


def product_rows_fp8(
    x: Rowwise, w: Rowwise, *, out: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """(x.values * x.scale) (w.values * w.scale)^T (+ plus), [M, N].

    x: [M, K]; w: [N, K], on a GPU N and K multiples of 16; out: what to fill, bfloat16 or float32, made in
    plus's dtype or else bfloat16 when None; plus: [M, N] in out's dtype, may be out itself. The units' fast
    accumulation is on: some 14 bits of the sum between the steps at which it is added up in float32.
    float32 results are exact instead, and slow: they are for tests. ValueError for what does not fit.
    """
    if out is None:
        dtype = torch.bfloat16 if plus is None else plus.dtype
        out = torch.empty(len(x.values), len(w.values), dtype=dtype, device=x.values.device)
    if x.values.is_cuda and out.dtype == torch.bfloat16:
        scales = Scales(x.scale, w.scale)
        if _through_library(x.values, w.values, out, plus, False, scales):
            return out
        if plus is not None:  # not every version adds a matrix to a row-wise scaled product
            return torch.add(product_rows_fp8(x, w), plus, out=out)
        scaled = torch._scaled_mm(
            x.values, w.values.t(), x.scale[:, None], w.scale[None, :], out_dtype=out.dtype, use_fast_accum=True
        )  # fmt: skip
        return out.copy_(scaled)
    _check(x.values, w.values, out, plus, False, Scales(x.scale, w.scale))
    result = x.dequantize() @ w.dequantize().t()
    return out.copy_(result if plus is None else result.add_(plus))


def _dense(x: Tensor, w: Tensor, out: Tensor | None, plus: Tensor | None, transposed: bool) -> Tensor:
    if out is None:
        out = x.new_empty(x.shape[0], w.shape[1 if transposed else 0])
    if x.is_cuda and x.dtype == torch.bfloat16 and _through_library(x, w, out, plus, transposed, None):
        return out
    _check(x, w, out, plus, transposed, None)
    right = w if transposed else w.t()
    if plus is None:
        return torch.mm(x, right, out=out)
    return torch.addmm(plus, x, right, out=out)


def _check(
    x: Tensor, w: Tensor, out: Tensor, plus: Tensor | None, transposed: bool, scales: Scales | None
) -> None:
    N, K = w.shape
    inner, outer = (N, K) if transposed else (K, N)
    if x.ndim != 2 or x.shape[1] != inner or x.dtype != w.dtype:
        raise ValueError(f"x is {_named(x)}; w, {_named(w)}, goes with a [M, {inner}] of its dtype")
    shape = (x.shape[0], outer)
    dtypes = (x.dtype,) if scales is None else (torch.bfloat16, torch.float32)
    if out.shape != shape or out.dtype not in dtypes:
        raise ValueError(f"out is {_named(out)}, expected {dtypes} {list(shape)}")
    if plus is not None and (plus.shape != shape or plus.dtype != out.dtype):
        raise ValueError(f"plus is {_named(plus)}, out {_named(out)}: they must have one shape and dtype")
    if scales is not None:
        for name, scale, rows in (("x", scales.x, x.shape[0]), ("w", scales.w, N)):
            if scale.shape != (rows,) or scale.dtype != torch.float32 or not scale.is_contiguous():
                raise ValueError(
                    f"{name}.scale is {_named(scale)}, expected contiguous torch.float32 [{rows}]"
                )


def _named(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


class Plan(NamedTuple):
    """A product's description and the algorithm that was chosen for it."""

    product: cublaslt.Product
    algorithm: object


@dataclass
class Family:
    """What is known of the products that differ in M alone."""

    times: dict[Config, list[tuple[float, float]]] = field(default_factory=dict)  # (waves, ms) of each race
    raced_at: list[int] = field(default_factory=list)  # the M of each race

    def enter(self, M: int, candidates: Sequence[Candidate], ms: Mapping[int, float]) -> None:
        """ms: of the candidates that took part, by their index; none if there was no room to race."""
        if ms:
            self.raced_at.append(M)
        for i, time in ms.items():
            self.times.setdefault(candidates[i].config, []).append((candidates[i].waves, time))


_families: dict[Hashable, Family] = {}
_plans: dict[Hashable, Plan | None] = {}  # None: for PyTorch


def _through_library(
    x: Tensor, w: Tensor, out: Tensor, plus: Tensor | None, transposed: bool, scales: Scales | None
) -> bool:
    """Fill out; False, with out untouched, where PyTorch has to."""
    pointers = x.data_ptr() | w.data_ptr() | out.data_ptr()
    added: Hashable = None
    if plus is not None:
        pointers |= plus.data_ptr()
        added = (plus.shape, plus.stride(), plus.dtype)
    best, least = cublaslt.MAX_ALIGNMENT, cublaslt.ALIGNMENT
    alignment = best if pointers % best == 0 else least if pointers % least == 0 else 1
    key: Hashable = (
        x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype, out.shape, out.stride(), out.dtype,
        added, transposed, alignment, x.device.index, measure,
    )  # fmt: skip
    try:
        plan = _plans[key]
    except KeyError:
        plan = _plan(key, alignment, x, w, out, plus, transposed, scales)
    if plan is None:
        return False
    try:
        plan.product.run(plan.algorithm, x, w, out, plus, scales)
    except cublaslt.UnsupportedError:  # the library may offer an algorithm and only then look at plus
        _keep(key, None)
        return False
    return True


def _plan(
    key: Hashable,
    alignment: int,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    plus: Tensor | None,
    transposed: bool,
    scales: Scales | None,
) -> Plan | None:
    """What `key` is to stand for from now on."""
    _check(x, w, out, plus, transposed, scales)
    matrices = [x, w, out] if plus is None else [x, w, out, plus]
    if len({m.device for m in matrices}) > 1:
        raise ValueError(f"matrices on different devices: {[str(m.device) for m in matrices]}")
    if cublaslt.library() is None or not all(map(cublaslt.takes, matrices)):
        return _keep(key, None)
    described = cublaslt.Product(x, w, out, plus, transposed, scales)
    candidates = described.candidates(CANDIDATES, alignment)
    if not candidates:
        described.free()
        return _keep(key, None)
    if not measure:
        return _keep(key, Plan(described, candidates[0].algorithm))

    M = x.shape[0]
    strides = tuple(cublaslt.row_stride(m) for m in matrices)
    name = (w.shape, w.dtype, strides, transposed, plus is not None, alignment, x.device.index)
    family = _families.setdefault(name, Family())
    if wants_race(candidates, family, M):
        if torch.cuda.is_current_stream_capturing():
            key = (key, "captured")  # for now: outside of the capture it will be measured
        else:
            family.enter(M, candidates, _race(described, candidates, x, w, out, plus, scales))
    return _keep(key, Plan(described, choose(candidates, family.times).algorithm))


def _keep(key: Hashable, plan: Plan | None) -> Plan | None:
    replaced = _plans.pop(key, None)
    if replaced is not None:
        replaced.product.free()
    while len(_plans) >= MAX_PLANS:
        oldest = _plans.pop(next(iter(_plans)))
        if oldest is not None:
            oldest.product.free()
    _plans[key] = plan
    return plan


def wants_race(candidates: Sequence[Candidate], family: Family, M: int) -> bool:
    """Whether some candidate was never measured, and M is new enough to be worth a race."""
    if len(family.raced_at) >= MAX_RACES or all(c.config in family.times for c in candidates):
        return False
    return all(max(M, other) > RATIO * min(M, other) for other in family.raced_at)


def choose(
    candidates: Sequence[Candidate], times: Mapping[Config, Sequence[tuple[float, float]]]
) -> Candidate:
    """The measured candidate with the least predicted time; the first of all where none was measured."""
    measured = [c for c in candidates if c.config in times]
    return min(measured, key=lambda c: predicted_ms(c.waves, times[c.config]), default=candidates[0])


def predicted_ms(waves: float, times: Sequence[tuple[float, float]]) -> float:
    """times: (waves, ms) of one configuration; the nearest number of waves counts."""
    nearest, ms = min(times, key=lambda time: abs(math.log(_whole(time[0]) / _whole(waves))))
    return ms * _whole(waves) / _whole(nearest)


def _whole(waves: float) -> int:
    return max(math.ceil(waves - 1e-3), 1)  # it comes as a rounded float32


def _race(
    described: cublaslt.Product,
    candidates: Sequence[Candidate],
    x: Tensor,
    w: Tensor,
    out: Tensor,
    plus: Tensor | None,
    scales: Scales | None,
) -> dict[int, float]:
    """ms of the candidates on these very matrices. out is written over and over, with what belongs there."""
    target = out
    if plus is not None and plus.data_ptr() == out.data_ptr():
        try:
            target = torch.empty_strided(
                out.shape, (cublaslt.row_stride(out), 1), dtype=out.dtype, device=out.device
            )
        except torch.OutOfMemoryError:
            return {}

    def lap(entrants: Sequence[int], repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(entrants) + 1)]
        refused = set()
        events[0].record()
        for i, event in zip(entrants, events[1:]):
            try:
                for _ in range(repeats):
                    described.run(candidates[i].algorithm, x, w, target, plus, scales)
            except cublaslt.UnsupportedError:
                refused.add(i)
            event.record()
        events[-1].synchronize()
        spans = zip(entrants, events, events[1:])
        return [math.inf if i in refused else a.elapsed_time(b) / repeats for i, a, b in spans]

    return race(len(candidates), lap)


def race(
    entrants: int, lap: Callable[[Sequence[int], int], list[float]], budget_ms: float = BUDGET_MS
) -> dict[int, float]:
    """The least ms of each entrant in several laps, about budget_ms in all.

    lap(entrants, repeats): runs each that many times and gives the ms of one time, inf where the library
    refuses to run it; those are left out. Laps take turns, so that a clock that slows as the GPU warms up
    favours nobody. Who is clearly behind drops out; where a lap takes long, the last ones, which the library
    expects to be slowest, do not even start.
    """
    for i in range(entrants):
        lap([i], 1)  # a first run loads its kernel
        expected = max(lap([i], 1)[0], 1e-3)
        if expected < math.inf:
            break
    else:
        return {}
    repeats = max(min(int(LAP_MS / expected), 10), 1)
    entrants = max(min(entrants, int(budget_ms / (2.5 * expected * repeats))), min(entrants, 2))
    running = list(range(entrants))
    spent = 2 * expected + sum(t for t in lap(running, 1) if t < math.inf)
    best = dict.fromkeys(running, math.inf)
    for _ in range(MAX_LAPS):
        for i, ms in zip(running, lap(running, repeats)):
            best[i] = min(best[i], ms)
            spent += repeats * ms if ms < math.inf else 0.0
        least = min(best.values())
        running = [i for i in running if best[i] <= CLOSE * least]
        if len(running) < 2 or spent + repeats * least * len(running) > budget_ms:
            break
    return {i: ms for i, ms in best.items() if ms < math.inf}
