"""One training step: its numbers, its gradient, and what the host waits for."""

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hdl.config import Flow, Train
from hdl.data.batches import Batch, pack
from hdl.data.samples import Sample
from hdl.engine.processes import Processes
from hdl.engine.step import Measured, TrainStep
from hdl.flow.noise import VARIANTS
from hdl.flow.step import flow_matching_loss
from hdl.report.curves import band_sums

REPOSITORY = Path(__file__).parents[2]
GRIDS = [(1, 2), (1, 1), (2, 2), (1, 3)]
SIGMAS = torch.tensor([0.1, 0.35, 0.4, 0.95])


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


class Gain(nn.Module):
    """A model small enough to follow: every column of z times a number of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 3072))
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, z: Tensor, t: Tensor, layout: object) -> Tensor:
        return self.dropout(z * self.gain)


class Accumulating:
    """DeepSpeed's manners: gradients are averaged over micro-batches, the last step() updates."""

    def __init__(self, model: nn.Module, micro_batches: int) -> None:
        self.model, self.micro_batches, self.steps = model, micro_batches, 0
        self.norm: Tensor | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        return self.model(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.micro_batches == 0:
            self.norm = torch.stack([p.grad.norm() for p in self.model.parameters()]).norm()  # type: ignore[union-attr]

    def get_global_grad_norm(self) -> Tensor | None:
        return self.norm


def batch_of(places: list[int]) -> Batch:
    samples = []
    for place in places:
        rows, cols = GRIDS[place]
        pixels = torch.randint(
            0, 256, (rows * cols, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(place)
        )
        ids = torch.zeros(3 + place, dtype=torch.int64)
        samples.append(Sample(f"s{place}", pixels, rows, cols, ids, torch.zeros(3 + place, 8), ""))
    return pack(samples, places, sum(r * c for r, c in GRIDS))


def train_step(
    engine: Any,
    processes: Processes | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> TrainStep:
    return TrainStep(
        engine, processes or Processes(0, 1, torch.device("cpu")),
        variant=VARIANTS["full"], flow=Flow(), seed=5, dropout=dropout, dtype=dtype, fused=False,
    )  # fmt: skip


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]])
def test_numbers_and_gradient_do_not_depend_on_micro_batches(cut: list[list[int]]) -> None:
    model = Gain()
    loss, errors = flow_matching_loss(
        model, batch_of([0, 1, 2, 3]), SIGMAS, 7, variant=VARIANTS["full"], flow=Flow(), seed=5
    )
    loss.backward()
    expected = model.gain.grad
    model = Gain()
    step = train_step(Accumulating(model, len(cut)))
    measured = Measured.read(step.forward_backward(7, [batch_of(places) for places in cut], SIGMAS))
    assert model.gain.grad is not None and expected is not None
    assert measured.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert measured.tokens == sum(3 + i for i in range(4)) + 10
    assert torch.allclose(measured.bands, band_sums(SIGMAS, errors), rtol=1e-6)
    assert measured.bands[1].tolist() == [1, 2, 0, 1]
    assert float(step.update().wait()) == pytest.approx(float(expected.norm()), rel=1e-5)
    assert torch.allclose(model.gain.grad, expected, rtol=1e-4, atol=1e-7)


def test_dropout_belongs_to_the_step_and_nothing_else_draws() -> None:
    """A step drops the same whatever was drawn before it, and leaves the generator as it was."""

    def loss_of(number: int, dropout: float) -> float:
        step = train_step(Accumulating(Gain(dropout), 1), dropout=dropout)
        state = torch.get_rng_state()
        measured = Measured.read(step.forward_backward(number, [batch_of([0, 1, 2, 3])], SIGMAS))
        step.update()
        assert torch.equal(torch.get_rng_state(), state)
        return measured.loss

    first = loss_of(3, 0.5)
    torch.rand(5)
    assert loss_of(3, 0.5) == first != loss_of(3, 0.0)
    assert loss_of(3, 0.0) == loss_of(3, 0.0)


CUDA = torch.cuda.is_available()
ZERO2 = REPOSITORY / "ds_configs/zero2.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [1e9, 1e-3, 0.0])
def test_clipping_is_deepspeeds_own(
    group: Processes, dtype: torch.dtype, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same norms, and the same gradient for the optimizer: within bounds, above them, unbounded."""
    from hdl.engine import sharding  # imports DeepSpeed, which looks at the process group's environment
    from hdl.engine.moments import read_moments

    def norms_and_gradient() -> tuple[list[float], Tensor]:
        train = Train(batch_size=4, warmup_steps=0, grad_clip=clip, betas=(0.0, 0.0), deepspeed=ZERO2)
        engine = sharding.shard(Gain().to(group.device), train, dtype, group)
        step = train_step(engine, group, dtype=dtype)
        norms = []
        for number in range(3):
            step.forward_backward(number, [batch_of([0, 1, 2, 3])], SIGMAS)
            norms.append(float(step.update().wait()))
        [first_moment] = [m for name, m in read_moments(engine).items() if "exp_avg_sq" not in name]
        return norms, first_moment.flatten()  # which with these betas is the last gradient

    norms, gradient = norms_and_gradient()
    with monkeypatch.context() as patched:
        patched.setattr(sharding, "clip_without_waiting", lambda engine: None)
        norms_of_theirs, gradient_of_theirs = norms_and_gradient()
    assert norms == pytest.approx(norms_of_theirs, rel=1e-5)
    assert all(now != before for before, now in pairwise(norms)) and min(norms) > 1e-2
    assert torch.allclose(gradient, gradient_of_theirs, rtol=1e-5)
    assert float(gradient.norm()) == pytest.approx(clip if clip == 1e-3 else norms[-1], rel=2e-3)


def test_a_gradient_that_is_not_finite_is_told_by_its_norm(group: Processes) -> None:
    from hdl.engine.sharding import shard

    for dtype in (torch.float32, torch.bfloat16):
        model = Gain().to(group.device)
        model.gain.register_hook(lambda gradient: gradient * float("nan"))
        engine = shard(model, Train(batch_size=4, warmup_steps=0, deepspeed=ZERO2), dtype, group)
        step = train_step(engine, group, dtype=dtype)
        measured = Measured.read(step.forward_backward(0, [batch_of([0, 1, 2, 3])], SIGMAS))
        assert math.isfinite(measured.loss)
        assert not torch.isfinite(step.update().wait())


class Slow(torch.autograd.Function):
    """Nothing on the way forward; on the way back the GPU sleeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.cuda._sleep(1_000_000_000)  # clock ticks: about half a second
        return gradient


@pytest.mark.skipif(not CUDA, reason="needs a GPU's queue")
def test_the_host_is_done_with_a_step_while_the_gpu_is_still_at_its_backward(group: Processes) -> None:
    from hdl.engine.sharding import shard

    class SlowGain(Gain):
        def forward(self, text: Tensor, z: Tensor, t: Tensor, layout: object) -> Tensor:
            return Slow.apply(super().forward(text, z, t, layout))

    train = Train(batch_size=4, warmup_steps=0, deepspeed=ZERO2)
    engine = shard(SlowGain().to(group.device), train, torch.bfloat16, group)
    step = train_step(engine, group, dtype=torch.bfloat16)
    host, gpu = [], []
    for number in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = Measured.read(step.forward_backward(number, [batch_of([0, 1, 2, 3])], SIGMAS)).loss
        norm = step.update()
        host.append(time.perf_counter() - start)
        assert float(norm.wait()) > 0 and loss > 0
        gpu.append(time.perf_counter() - start)
    assert min(gpu) > 0.2
    assert max(host[2:]) < 0.5 * min(gpu), (host, gpu)  # the first compile and allocate
