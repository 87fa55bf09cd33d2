"""What is trained on, in whole runs and steps: mixtures, packs by tokens, samples held out, for any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hdl.config import Flow, Train, load_run
from hdl.data.batches import Batches
from hdl.data.fetch import ShardLost
from hdl.data.mixture import Mixture, Source
from hdl.data.packing import Packs
from hdl.data.picks import Draws
from hdl.data.prepare import Options, prepare
from hdl.data.reading import Reader
from hdl.data.shards import Shards
from hdl.data.steps import ByTokens, Steps
from hdl.engine.budget import fullest, work_of
from hdl.engine.held_out import HeldOut
from hdl.engine.held_out import Measured as MeasuredHeldOut
from hdl.engine.processes import Processes
from hdl.engine.sharding import shares
from hdl.engine.step import Measured, TrainStep
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS
from hdl.flow.sigma import draw_sigmas
from hdl.memory.plan import Work
from hdl.o1.layout import Segment
from tests.engine.conftest import Launch
from tests.engine.test_runs import adapter
from tests.engine.test_step import Accumulating, Gain

PACKS = {"train__micro_batch_tokens": 170, "train__batch_packs": 4}

# train.py with another data section than the launcher's.
MIXED = """
import os, sys, tomllib
from pathlib import Path
import tomli_w, train

described = tomllib.loads(Path(sys.argv[1]).read_text())
described["data"] = {data!r}
mixed = Path(sys.argv[1] + os.environ.get("RANK", "0"))
mixed.write_text(tomli_w.dumps(described))
sys.argv[1] = str(mixed)
train.main()
"""


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_a_step_of_packs_is_the_same_on_any_number_of_ranks(shards: Path) -> None:
    """Losses, what is measured, and gradients: of a mixture with a weight for some samples, mirrored or not."""
    opened = Shards(shards)
    sources = [Source("a", opened, repeats=2.0), Source("b", opened, repeats=0.5, regularization=True)]
    mixed = Mixture(sources, regularization_weight=0.3)

    def steps_of(world: int) -> list[tuple[float, Tensor, Tensor, int]]:
        draws = Draws(mixed, 3, caption_dropout=0.2, mirror=True)
        steps = Steps(ByTokens(Packs(draws, 170), 4), world)
        readers = [
            Batches(steps, Reader(mixed, 3, 0.0, rank), rank, pin_memory=False) for rank in range(world)
        ]
        results = []
        for number in (0, 1, 5):
            plan, gradient, loss, bands, tokens = (
                steps.plan(number),
                torch.zeros(3072),
                0.0,
                torch.zeros(2, 4),
                0,
            )
            sigmas = draw_sigmas(
                plan.samples, 3, number, distribution="uniform", mean=0.0, std=1.0, shift=1.0
            )
            for reader in readers:  # one rank after another, in this process
                model, batches = Gain(), reader.of_step(number)
                alone = Processes(0, 1, torch.device("cpu"))
                step = TrainStep(
                    Accumulating(model, len(batches)), alone,
                    variant=VARIANTS["full"], flow=Flow(), seed=3, dropout=0.0, dtype=torch.float32, fused=False,
                )  # fmt: skip
                told = Measured.read(step.forward_backward(number, batches, sigmas))
                assert model.gain.grad is not None
                gradient += model.gain.grad
                loss, bands, tokens = loss + told.loss, bands + told.bands, tokens + told.tokens
            assert int(bands[1].sum()) == plan.samples and tokens == plan.tokens
            results.append((loss, gradient, bands, tokens))
        for reader in readers:
            reader.close()
        return results

    whole = steps_of(1)
    for world in (2, 4):
        for (loss, gradient, bands, tokens), expected in zip(steps_of(world), whole):
            assert loss == pytest.approx(expected[0], rel=1e-6) and tokens == expected[3]
            assert torch.allclose(gradient, expected[1], rtol=1e-4, atol=1e-7)
            assert torch.allclose(bands, expected[2], rtol=1e-6)


def held_out_of(mixed: Mixture, world: int) -> list[MeasuredHeldOut]:
    """What each of `world` ranks finds, one after another in this process."""
    flags = [
        "--model.base",
        "b",
        "--data.shards",
        "s",
        "--save.output",
        "o",
        "--validation.held_out_samples",
        "7",
    ]
    parts: list[Any] = [None] * world

    class Rank(Processes):
        def gather(self, thing: Any) -> list[Any]:
            parts[self.rank] = thing
            return parts if None not in parts else [thing] * self.world

    model: Any = Gain(dropout=0.5)
    for _ in range(2):  # the first time round, not all parts are there
        found = [
            HeldOut(
                load_run(flags), mixed, Rank(rank, world, torch.device("cpu")), torch.float32, False
            ).measure(model)
            for rank in range(world)
        ]
    assert model.training and model.gain.grad is None
    assert len({len(part) for part in parts}) == 1  # forwards of each rank
    return found


def test_what_is_held_out_is_measured_alike_on_any_number_of_ranks(shards: Path) -> None:
    mixed = Mixture([Source("a", Shards(shards))], held_out=0.5)
    assert 1 < len(mixed.held_out) < 7
    [alone] = held_out_of(mixed, 1)
    assert int(alone.bands[1].sum()) == 7 and alone.loss == pytest.approx(float(alone.bands[0].sum()) / 7)
    for world in (2, 3):
        for found in held_out_of(mixed, world):
            assert found.loss == alone.loss and torch.equal(found.bands, alone.bands)


def test_a_held_out_sample_that_is_lost_is_not_the_runs_end(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = Mixture([Source("a", Shards(shards))], held_out=0.5)
    [whole] = held_out_of(mixed, 1)
    lost = {int(mixed.held_out[0])}

    def read(sample: int, caption: int, really: Any = mixed.read) -> Any:
        if sample in lost:
            raise ShardLost("shard-0", "shard-0 is gone")
        return really(sample, caption)

    monkeypatch.setattr(mixed, "read", read)
    [rest] = held_out_of(mixed, 1)
    assert int(rest.bands[1].sum()) == 7 and rest.loss != whole.loss
    assert "held-out samples are lost, others measured: shard-0 is gone" in capsys.readouterr().out
    lost |= set(mixed.held_out.tolist())
    with pytest.raises(HdlError, match=r"no held-out sample can be read: their shards are lost \(shard-0\)"):
        held_out_of(mixed, 1)


def test_packs_have_to_be_shared_out_over_the_ranks() -> None:
    packs = Train(micro_batch_tokens=80, batch_packs=6, batch_size=5)
    assert shares(packs, world=3) == (1, 2)
    with pytest.raises(
        HdlError, match=r"train.batch_packs 6 is not a multiple of the 4 processes; start with .* 8"
    ):
        shares(packs, world=4)


def test_the_heaviest_pack_is_full_of_the_longest_sample(shards: Path) -> None:
    infos = list(Shards(shards).infos)
    longest = max(infos, key=lambda i: i.patches + i.text_tokens[0])
    segment = Segment(longest.text_tokens[0], longest.rows, longest.cols)
    rest = Segment(2, 1, 11)
    assert fullest(infos, 3 * segment.tokens + 13) == Work.of([segment] * 3 + [rest])
    assert fullest(infos, segment.tokens + 1) == Work.of([segment])
    train = Train(micro_batch_tokens=segment.tokens, batch_packs=2)
    assert work_of(train, infos, 2) == Work.of([segment])
    assert work_of(Train(batch_size=4), infos, 2) == Work.of([segment] * 2) or len(infos) > 1


def mixture_of(shards: Path, other: Path) -> dict[str, Any]:
    return {
        "sources": {
            "photos": {"shards": str(shards), "weight": 3.0},
            "general": {"shards": str(other), "weight": 1.0, "regularization": True},
        },
        "tags": {"animals": "2x"}, "regularization_weight": 0.5, "held_out": 0.3, "mirror": True, "lanes": 2,
        "window": 1,
    }  # fmt: skip


@pytest.fixture
def other(photos: Path, tiny_base: Path, tmp_path: Path) -> Path:
    (photos / "styles.json").write_text('{"chelsea.png": {"style": "photo", "tags": ["animals"]}}')
    prepare(photos, tmp_path / "other", tiny_base, options=Options(area=96))
    (photos / "styles.json").unlink()
    return tmp_path / "other"


def test_a_mixture_in_packs_on_two_ranks_and_resumed_on_one(
    launch: Launch, other: Path, shards: Path, tmp_path: Path
) -> None:
    script = tmp_path / "mixed.py"
    script.write_text(MIXED.format(data=mixture_of(shards, other)))
    options = {**PACKS, "script": script, "validation__held_out_samples": 5, "save__every": 2}
    run = launch("two", processes=2, train__deepspeed="ds_configs/zero3.json", **options)
    assert run.status == 0, run.printed
    assert "mixture: an epoch is" in run.printed and "(regularization)" in run.printed
    assert "packs of 170 tokens a step" in run.printed and "mixture drawn, of " in run.printed
    names = run.curve_names()
    assert {
        "data/wait",
        "data/waste",
        "data/share/photos",
        "data/share/general",
        "data/share/animals",
    } <= set(names)
    assert 0.6 < run.curve("data/share/photos")[4] < 0.9
    assert all(0 <= waste < 0.7 for waste in run.curve("data/waste").values())
    held = run.curve("held_out/loss")
    assert held.keys() == {0, 2, 4} and len(set(held.values())) == 3
    assert sum(name.startswith("held_out/sigma_") for name in names) == 4

    alone = launch("alone", **options)
    assert alone.status == 0, alone.printed
    for name, tolerance in (("loss", 2e-5), ("grad_norm", 1e-3), ("held_out/loss", 2e-5)):
        assert alone.curve(name) == pytest.approx(run.curve(name), rel=tolerance), name
    assert held[0] == pytest.approx(alone.curve("held_out/loss")[0], rel=1e-6)  # before anything was learnt
    newest = run.output / "checkpoints" / "step-000004"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = launch("two", resume=True, **options)
    assert resumed.status == 0, resumed.printed
    assert "resuming after step 2" in resumed.printed
    assert resumed.curve("loss") == pytest.approx(alone.curve("loss"), rel=2e-5)
    weights, others = adapter(resumed), adapter(alone)
    assert all((weights[n] - others[n]).norm() < 1e-3 * weights[n].norm() for n in weights)


def test_what_cannot_be_packed_or_mixed_is_said_before_a_weight_is_read(launch: Launch, shards: Path) -> None:
    small = launch("small", train__micro_batch_tokens=20, train__batch_packs=2, train__steps=1)
    assert small.status == 1 and "train.micro_batch_tokens 20: sample" in small.printed
    assert not small.output.exists()
