"""What can be wrong with a run is said before it starts, and nothing already made is lost."""

import re
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hdl.engine.processes as processes_module
from hdl.config import Run, Train
from hdl.data.prepare import Options, prepare
from hdl.engine.agreement import account, check_alike, first_difference
from hdl.engine.processes import Processes, check_described
from hdl.engine.sharding import read_strategy, shares
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.prompt import PromptEncoder
from tests.engine.conftest import Launch


def test_a_world_that_does_not_divide_the_batch() -> None:
    with pytest.raises(HdlError, match="batch_size 4 is not a multiple of the 3 processes.*batch_size 6"):
        shares(Train(batch_size=4), world=3)
    with pytest.raises(HdlError, match="micro_batch_size 4 does not divide a rank's share of the batch, 6"):
        shares(Train(batch_size=12, micro_batch_size=4), world=2)
    assert shares(Train(batch_size=12, micro_batch_size=3), world=2) == (3, 2)


def test_strategies_that_are_not_one(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    with pytest.raises(HdlError, match="no such file"):
        read_strategy(path)
    path.write_text("{")
    with pytest.raises(HdlError, match="not readable as JSON"):
        read_strategy(path)
    path.write_text('{"train_batch_size": 3, "zero_optimization": {"stage": 2}}')
    with pytest.raises(HdlError, match="sets train_batch_size; set the run's own options"):
        read_strategy(path)
    path.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(HdlError, match="stage is 0, expected 1, 2 or 3"):
        read_strategy(path)


def test_shards_of_another_base(launch: Launch, tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    file = other / "model-00002-of-00005.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.embed_tokens.weight"] += 1
    save_file(tensors, file)
    run = launch(model__base=other)
    assert run.status == 1 and "shards of another base" in run.printed
    assert not run.output.exists()


def test_an_output_folder_of_another_run_is_never_touched(launch: Launch, tmp_path: Path) -> None:
    for name, text in (("run", "my notes"), ("file", None)):
        if text is None:
            (tmp_path / name).write_text("a file where the folder should be")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "notes.txt").write_text(text)
        run = launch(name)
        assert run.status == 1 and "nothing was changed there" in run.printed, run.printed
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    missing = launch("empty", resume=True)
    assert missing.status == 1 and "holds no run to resume" in missing.printed


def test_an_unwritable_output_folder(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    run = launch("occupied/run")
    assert run.status == 1 and "cannot be written to" in run.printed


@pytest.fixture
def poisoned(photos: Path, tiny_base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base whose row for one word is NaN, and shards in which one caption has that word."""
    base, out, images = tmp_path / "base", tmp_path / "poisoned", tmp_path / "images"
    shutil.copytree(tiny_base, base)
    shutil.copytree(photos, images)
    encoder = PromptEncoder(open_checkpoint(base))
    captions = [file.read_text() for file in sorted(images.glob("*.txt"))]
    usual = {token for caption in captions for token in encoder.ids(caption)} | set(encoder.ids(" "))
    rare = next(t for t in encoder.ids("ZQ#") if t not in usual)
    file = base / "model-00002-of-00005.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.embed_tokens.weight"][rare] = float("nan")
    save_file(tensors, file)
    (images / "coffee.txt").write_text("a photograph of coffee ZQ#")
    prepare(images, out, base, options=Options(area=64))
    return base, out


def test_a_loss_that_is_not_finite_stops_the_run(launch: Launch, poisoned: tuple[Path, Path]) -> None:
    base, out = poisoned
    options = {"model__base": base, "data__shards": out, "train__batch_size": 2, "train__steps": 9}
    run = launch(processes=2, save__every=100, data__caption_dropout=0, train__max_skipped=0, **options)
    assert run.status != 0
    assert "the loss of step" in run.printed and "is not finite" in run.printed
    assert "coffee" in run.printed and "at sigma 0." in run.printed
    kept = [p for p in (run.output / "checkpoints").iterdir() if p.name.startswith("step-")]
    assert len(kept) == 1
    stopped_at = int(run.printed.split("the loss of step ")[1].split()[0])
    assert kept[0].name == f"step-{stopped_at - 1:06d}"
    weights = load_file(kept[0] / "adapter_model.safetensors") | load_file(kept[0] / "optimizer.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())


SPOILED = """
import itertools, train
import hdl.engine.loop as loop

def shard(model, *others, really=loop.shard):
    gradients = itertools.count(1)
    [*_, last] = (p for p in model.parameters() if p.requires_grad)
    last.register_hook(lambda gradient: gradient * float("inf" if next(gradients) == 3 else 1))
    return really(model, *others)

loop.shard = shard
train.main()
"""


@pytest.mark.parametrize(
    ("dtype", "every", "kept"), [("bfloat16", 2, ["step-000002"]), ("float32", 3, []), ("bfloat16", 3, [])]
)
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_kept_of_it(
    launch: Launch, tmp_path: Path, dtype: str, every: int, kept: list[str]
) -> None:
    (tmp_path / "spoiled.py").write_text(SPOILED)
    pictures = {"prompts": ["a cat"], "every": every, "height": 32, "width": 32, "steps": 2}
    run = launch(
        script=tmp_path / "spoiled.py", model__dtype=dtype, train__steps=9, save__every=every, train__max_skipped=0,
        **{f"validation__{name}": value for name, value in pictures.items()},
    )  # fmt: skip
    assert run.status != 0
    assert "the gradient of step 3 is not finite" in run.printed, run.printed
    assert [p.name for p in (run.output / "checkpoints").glob("*")] == kept
    drawn = sorted(p.name for p in (run.output / "pictures").iterdir())
    assert drawn == [f"{name}.png" for name in ["step-000000", *kept]]
    assert not (run.output / "adapter").exists()
    assert run.curve("loss").keys() == run.curve("grad_norm").keys() == {1, 2}


UNREADABLE = """
import train
from hdl.data.batches import Batches
from hdl.errors import HdlError

def of_step(self, step, really=Batches.of_step):
    if step == 3:
        raise HdlError("a shard is gone")
    return really(self, step)

Batches.of_step = of_step
train.main()
"""


def test_curves_reach_the_last_step_before_a_sample_that_cannot_be_read(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "unreadable.py").write_text(UNREADABLE)
    run = launch(script=tmp_path / "unreadable.py", train__steps=9, save__every=100)
    assert run.status == 1 and "a shard is gone" in run.printed
    assert run.curve("loss").keys() == run.curve("grad_norm").keys() == {1, 2, 3}


def test_a_damaged_shard_stops_the_run_before_it_starts(launch: Launch, shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    tar = next(damaged.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-5000])
    run = launch(data__shards=damaged)
    assert run.status == 1 and tar.name in run.printed
    assert not run.output.exists()


def test_a_checkpoint_of_another_adapter_base_or_data_is_not_resumed(
    launch: Launch, photos: Path, tmp_path: Path, tiny_base: Path
) -> None:
    """Told before weights are read, naming both; nothing in the folder changes."""
    run = launch(train__steps=2)
    assert run.status == 0, run.printed
    config = (run.output / "config.toml").read_text()
    prepare(photos, tmp_path / "other", tiny_base, options=Options(area=64))
    resumed = launch(resume=True, data__shards=tmp_path / "other")
    assert resumed.status == 1 and "step-000002 is of another data (" in resumed.printed
    resumed = launch(resume=True, lora__rank=8)
    assert resumed.status == 1
    assert re.search(
        r"another adapter shape \(rank 4, targets .*\) than this config's \(rank 8", resumed.printed
    )
    for options, said in (
        ({"lora__alpha": 400}, r"another adapter scale \(alpha 32\) than this config's \(alpha 400\)"),
        ({"model__variant": "dev"}, r"another variant \(full\) than this config's \(dev\)"),
    ):
        resumed = launch(resume=True, **options)
        assert resumed.status == 1 and re.search(said, resumed.printed), resumed.printed
    assert (run.output / "config.toml").read_text() == config
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    file = base / "model-00002-of-00005.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.embed_tokens.weight"] += 1
    save_file(tensors, file)
    prepare(photos, tmp_path / "shards of it", base, options=Options(area=128))
    resumed = launch(resume=True, data__shards=tmp_path / "shards of it", model__base=base)
    assert resumed.status == 1 and re.search(
        r"another base \(sha256:\w+\) than this config's \(sha256:\w+\)", resumed.printed
    )


def test_a_run_that_ended_before_its_first_step_leaves_its_folder_to_the_next(launch: Launch) -> None:
    wrong = launch(lora__targets="q_porj", train__steps=2, train__warmup_steps=1)
    assert wrong.status == 1 and "lora.targets 'q_porj' fits no linear of the model" in wrong.printed
    right = launch(train__steps=2, train__warmup_steps=1)
    assert right.status == 0, right.printed
    again = launch(train__steps=2, train__warmup_steps=1)
    assert again.status == 1 and "is the output of another run" in again.printed


def test_an_environment_that_describes_half_a_group() -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert check_described({}) and check_described({"WORLD_SIZE": "1"}) and not check_described(whole)
    for name in whole:
        with pytest.raises(HdlError, match=f"but not {name}; start with torchrun"):
            check_described({k: v for k, v in whole.items() if k != name})
    with pytest.raises(HdlError, match="WORLD_SIZE=two, expected a whole number"):
        check_described(whole | {"WORLD_SIZE": "two"})
    with pytest.raises(HdlError, match="RANK=2 with WORLD_SIZE=2; ranks are counted from 0"):
        check_described(whole | {"RANK": "2"})


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes_module, "MEETING", timedelta(seconds=2))
    with pytest.raises(HdlError, match="did not meet at 127.0.0.1:1 .* within 2 s"):
        processes_module.meet()


def test_a_torch_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(HdlError, match="is built without NCCL"):
        processes_module.check_nccl()


def test_ranks_with_another_config_or_code(tiny_base: Path, tmp_path: Path) -> None:
    sections = {"model": {"base": tiny_base}, "data": {"shards": str(tmp_path)}, "save": {"output": tmp_path}}
    run = Run.model_validate(sections)
    other = Run.model_validate(sections | {"train": {"lr": 0.5}})
    assert first_difference([account(run), account(run)]) is None
    told = first_difference([account(run), account(run), account(other)])
    assert told and "rank 2" in told and "has train.lr 0.5, rank 0" in told and "has 0.0001" in told
    code = account(run).code
    older = replace(account(run), code=code | {"torch": "2.1.0"})
    told = first_difference([account(run), older])
    assert told and "another version of torch than rank 0" in told and "2.1.0 and " in told
    changed = replace(account(run), code=code | {"hdl's source": "0123456789ab"})
    told = first_difference([account(run), changed])
    assert told and "another version of hdl's source" in told and code["hdl's source"] in told


def test_clocks_that_are_far_apart_get_a_word(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.model_validate(
        {"model": {"base": tiny_base}, "data": {"shards": str(tmp_path)}, "save": {"output": tmp_path}}
    )

    def start(skew: float) -> str:
        class Two(Processes):
            def gather(self, thing: Any) -> list[Any]:
                return [thing, replace(thing, clock=thing.clock - skew, host="slow")]

        check_alike(run, Two(0, 2, torch.device("cpu")))
        return capsys.readouterr().out

    assert start(30) == ""
    assert "the clock of rank 0" in (told := start(90)) and "90 s ahead of that of rank 1 (slow)" in told


def test_ranks_agree_on_an_error() -> None:
    class Two(Processes):
        def gather(self, thing: object) -> list[object]:
            return [thing, "rank 1 says no"]

    with pytest.raises(HdlError, match="rank 1 says no"):
        Two(0, 2, torch.device("cpu")).all_or_none(None)
