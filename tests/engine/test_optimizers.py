"""Optimizers and masters: what a step does to a weight, what is refused, and that moments can be kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import hdl.engine.rounding_adamw as rounding_adamw
from hdl.config import Train
from hdl.engine.processes import Processes
from hdl.engine.rounding_adamw import RoundingAdamW, round_stochastically
from hdl.errors import HdlError

REPOSITORY = Path(__file__).parents[2]
ZERO2, ZERO3 = (REPOSITORY / f"ds_configs/zero{stage}.json" for stage in "23")
EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("x", [1.004, -0.99999, 0.0299, -3.3e-3, 65537.1, 1e-30, -1e-40])
def test_rounding_is_right_on_average(x: float) -> None:
    """Over all bits there are; 0.99999 rounds into the next power of two, 1e-40 is not a normal number."""
    value = torch.tensor(x)
    rounded = round_stochastically(value.expand(2**16).clone(), torch.arange(2**16, dtype=torch.int32))
    assert rounded.double().mean().item() == pytest.approx(float(value), rel=1e-12)
    assert len(rounded.unique()) == 2
    assert value.bfloat16() in rounded  # the nearest, and its neighbour on the other side


@pytest.mark.parametrize("bits", [0, 1, 2**15, 2**16 - 1])
def test_rounding_keeps_what_bfloat16_holds(bits: int) -> None:
    """All 65536 of them, infinities, NaN and both zeros included."""
    kept = round_stochastically(EVERY_BFLOAT16.float(), torch.full((2**16,), bits, dtype=torch.int32))
    number = ~EVERY_BFLOAT16.isnan()
    assert torch.equal(kept[number].view(torch.int16), EVERY_BFLOAT16[number].view(torch.int16))
    assert kept[~number].isnan().all()
    # the NaN of a GPU, and one that is infinity in its upper half
    others = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(others, torch.full((3,), bits, dtype=torch.int32)).isnan().all()


def stepped(parameter: nn.Parameter, gradients: list[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01}


def test_small_steps_move_a_weight_by_the_right_amount_on_average() -> None:
    """Adam's steps under a steady gradient are lr = 1e-4; half a bfloat16 step below 1 is 2e-3."""
    n, steps = 20000, 15
    gradients = [torch.full((n,), 0.5)] * steps
    nearest = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    assert stepped(nearest, gradients, torch.optim.AdamW([nearest], **SETTINGS)).eq(1).all()  # stands still
    exact = nn.Parameter(torch.ones(n))
    moved = float(1 - stepped(exact, gradients, torch.optim.AdamW([exact], **SETTINGS))[0])
    assert moved == pytest.approx(steps * 1e-4, rel=0.02)
    ours = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    moves = 1 - stepped(ours, gradients, RoundingAdamW([ours], seed=3, **SETTINGS)).double()
    assert moves.mean().item() == pytest.approx(moved, abs=4 * moves.std().item() / n**0.5)
    assert moves.std().item() / n**0.5 < 0.02 * moved  # or the line above says little


def random_case(n: int, steps: int = 3) -> tuple[Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(n, generator=random).bfloat16()
    return weights, [torch.randn(n, generator=random).bfloat16() for _ in range(steps)]


def test_a_step_is_torchs_adamw_up_to_the_rounding() -> None:
    weights, gradients = random_case(5000, steps=1)
    ours, theirs = nn.Parameter(weights.clone()), nn.Parameter(weights.float())
    mine = RoundingAdamW([ours], seed=3, **SETTINGS)
    torchs = torch.optim.AdamW([theirs], fused=True, **SETTINGS)
    after, exact = stepped(ours, gradients, mine), stepped(theirs, gradients, torchs)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(mine.state[ours][moment], torchs.state[theirs][moment])
    assert ((after.float() - exact).abs() <= 2**-7 * exact.abs()).all()  # a bfloat16 step at most
    assert after.ne(weights).any()


def test_random_bits_belong_to_seed_step_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One partition or three, whose borders are not those of pieces: the same to the bit."""
    monkeypatch.setattr(rounding_adamw, "PIECE", 1000)
    weights, gradients = random_case(3 * 1700)

    def whole(seed: int) -> Tensor:
        parameter = nn.Parameter(weights.clone())
        return stepped(parameter, gradients, RoundingAdamW([parameter], seed=seed, **SETTINGS))

    parts = []
    for rank in range(3):
        mine = slice(1700 * rank, 1700 * (rank + 1))
        part = nn.Parameter(weights[mine].clone())
        optimizer = RoundingAdamW([part], seed=3, rank=rank, **SETTINGS)
        parts.append(stepped(part, [g[mine] for g in gradients], optimizer))
    assert torch.equal(torch.cat(parts), whole(3))
    assert not torch.equal(whole(3), whole(4))
    # neither pieces nor steps repeat each other
    same = nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
    optimizer = RoundingAdamW([same], seed=3, **SETTINGS)
    first = stepped(same, [torch.ones(3000)], optimizer).clone().view(3, 1000)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    same.data.fill_(1)
    assert not torch.equal(stepped(same, [torch.ones(3000)], optimizer), first.flatten())


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    from hdl.engine.sharding import check_optimizer

    for optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        with pytest.raises(HdlError, match=f"train.optimizer {optimizer} needs a CUDA GPU"):
            check_optimizer(Train(optimizer=optimizer), CPU, torch.float32)
        check_optimizer(Train(optimizer=optimizer), torch.device("cuda"), torch.bfloat16)
        with pytest.raises(ValidationError, match=f"needs optimizer adamw: {optimizer} rounds to nearest"):
            Train(optimizer=optimizer, master="bfloat16")
    check_optimizer(Train(master="bfloat16", deepspeed=ZERO2), CPU, torch.bfloat16)
    with pytest.raises(HdlError, match="train.master bfloat16: .* needs model.dtype bfloat16"):
        check_optimizer(Train(master="bfloat16", deepspeed=ZERO2), CPU, torch.float32)
    with pytest.raises(HdlError, match="train.master bfloat16: .*zero3.json is ZeRO-3"):
        check_optimizer(Train(master="bfloat16", deepspeed=ZERO3), CPU, torch.bfloat16)
    offloaded = tmp_path / "offloaded.json"
    offloaded.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(HdlError, match="train.master bfloat16: .* has offload_optimizer"):
        check_optimizer(Train(master="bfloat16", deepspeed=offloaded), CPU, torch.bfloat16)


class Gain(nn.Module):
    """x times two vectors of numbers, named as in an adapter; no whole number of 8-bit optimizers' blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.ParameterDict({"lora_A": torch.linspace(0.5, 1.5, 5001), "lora_B": torch.ones(5001)})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.times["lora_A"] * self.times["lora_B"]


def engine_for(group: Processes, dtype: torch.dtype, **options: Any) -> Any:
    from hdl.engine.sharding import shard

    train = Train(**({"batch_size": 1, "warmup_steps": 0, "lr": 1e-3, "deepspeed": ZERO2} | options))
    return shard(Gain().to(group.device), train, dtype, group)


def take_steps(engine: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(5001, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x.to(engine.device, engine.module.times.lora_A.dtype)).float().square().sum())
        engine.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_bfloat16_master_is_the_trained_parameters_themselves(
    group: Processes, tmp_path: Path, stage: int
) -> None:
    strategy = tmp_path / "zero.json"
    strategy.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    engine = engine_for(group, torch.bfloat16, master="bfloat16", deepspeed=strategy)
    [master] = engine.optimizer.single_partition_of_fp32_groups
    assert master.dtype == torch.bfloat16
    assert master.data_ptr() == engine.module.times.lora_A.data_ptr()
    before = engine.module.times.lora_B.detach().clone()
    take_steps(engine, range(3))
    assert engine.module.times.lora_B.dtype == torch.bfloat16
    assert torch.equal(master.detach()[5001:10002], engine.module.times.lora_B.detach())
    moved = (engine.module.times.lora_B.detach() - before).float()
    assert -4e-3 < moved.mean() < -2e-3 and moved.ne(0).float().mean() < 0.9  # 3 steps of 1e-3, 4e-3 apart
    state = engine.optimizer.optimizer.state[master]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


KINDS = [
    ("adamw", "float32"), ("adamw", "bfloat16"), ("adamw_8bit", "float32"), ("paged_adamw_8bit", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "master"), KINDS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_survive_a_checkpoint_to_the_bit(group: Processes, optimizer: str, master: str) -> None:
    """8-bit ones too: bitsandbytes has the arithmetic on a CPU, though hdl does not offer it there."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    from hdl.engine.moments import read_moments, write_moments

    options = {"optimizer": optimizer, "master": master}
    whole = engine_for(group, torch.bfloat16, **options)
    take_steps(whole, range(2))
    saved = read_moments(whole)
    masters = {n: safe_get_full_fp32_param(p) for n, p in whole.module.named_parameters()}
    assert all(m.dtype == torch.float32 and m.count_nonzero() > 0 for m in saved.values())
    if "8bit" in optimizer:
        assert any(s["state1"].dtype == torch.uint8 for s in whole.optimizer.optimizer.state.values())

    resumed = engine_for(group, torch.bfloat16, **options)
    with torch.no_grad():
        for (name, parameter), old in zip(resumed.module.named_parameters(), whole.module.parameters()):
            parameter.copy_(old)
            safe_set_full_fp32_param(parameter, masters[name])
    write_moments(resumed, saved, 2)
    again, undisturbed = read_moments(resumed), read_moments(whole)
    assert saved.keys() == again.keys() and all(torch.equal(undisturbed[n], again[n]) for n in saved)
    for name in saved:
        error = (again[name] - saved[name]).abs().max() / saved[name].abs().max()
        assert error < 0.01 if "8bit" in optimizer else error == 0, name
    resumed.lr_scheduler.last_epoch = 1
    resumed.lr_scheduler.step()
    for engine in (whole, resumed):
        take_steps(engine, range(2, 4))
    for ours, theirs in zip(resumed.module.parameters(), whole.module.parameters()):
        assert torch.equal(ours, theirs)
        assert torch.equal(safe_get_full_fp32_param(ours), safe_get_full_fp32_param(theirs))
