"""Whole runs of train.py on a GPU: options that no other test takes there, on the fused path beside the plain one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch

from hdl.data.prepare import Options, prepare
from tests.engine.conftest import REPOSITORY, Finished
from tests.engine.test_pair_runs import write_edits
from tests.flow.encoders import save_encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
MINI = REPOSITORY / "hdl/mini/o1-mini"
STEPS = 12
Options_ = dict[str, object]
Start = Callable[..., Finished]


@pytest.fixture(scope="module")
def edits(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the tiny base: the small O1 comes without the tower that sees."""
    folder, out = tmp_path_factory.mktemp("gpu-pictures"), tmp_path_factory.mktemp("gpu-edits")
    prepare(write_edits(photos, folder), out, tiny_base, options=Options(area=96))
    return out


@pytest.fixture(scope="module")
def pictures(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu-shards")
    prepare(photos, out, MINI, options=Options(area=96))
    return out


@pytest.fixture
def start(pictures: Path, tmp_path: Path) -> Start:
    """A run of its own process, with options as section__field; it has to end well unless `status` says otherwise."""

    def run(name: str, status: int = 0, resume: bool = False, **options: object) -> Finished:
        described: dict[str, dict[str, object]] = {
            "model": {"base": str(MINI)},
            "data": {"shards": str(pictures)},
            "lora": {"rank": 8},
            "train": {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2, "seed": 3},
            "save": {"output": str(tmp_path / name), "every": STEPS // 2},
        }
        for option, value in options.items():
            section, field = option.split("__")
            described.setdefault(section, {})[field] = str(value) if isinstance(value, Path) else value
        config = tmp_path / f"{name}.toml"
        config.write_text(tomli_w.dumps(described))
        command = [sys.executable, "train.py", str(config), *(["--resume"] if resume else [])]
        ran = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300
        )
        finished = Finished(ran.returncode, ran.stdout + ran.stderr, tmp_path / name)
        assert finished.status == status, finished.printed
        return finished

    return run


KINDS: dict[str, Options_] = {
    "usual": {},
    "accumulated": {"train__micro_batch_size": 2},
    "preserved": {"data__trigger": "a photograph", "preserve__share": 0.25},
    "averaged": {"train__ema": 0.9, "data__held_out": 0.4, "validation__every": 6},
    "patterns": {
        "lora__rank_pattern": {"q_proj": 4, r"layers\.[0-1]\..*": 2}, "lora__alpha_pattern": {"v_proj": 16.0},
    },
    "min-SNR": {"flow__weighting": "min_snr", "flow__sigma": "logit_normal", "flow__shift": 3.0},
    "8-bit moments": {"train__optimizer": "adamw_8bit", "train__ema": 0.9},
    "paged moments": {"train__optimizer": "paged_adamw_8bit"},
    "own master": {"train__master": "bfloat16"},
    "recomputed": {"model__keep": "input"},
}  # fmt: skip


def assert_close(run: Finished, other: Finished, within: float = 0.03) -> None:
    """In bfloat16 both, whose paths round in other places."""
    ours, theirs = run.curve("loss"), other.curve("loss")
    assert len(ours) == STEPS and ours == pytest.approx(theirs, rel=within)
    assert len(set(ours.values())) > STEPS // 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_path_learns_as_the_plain_one(start: Start, kind: str) -> None:
    options = KINDS[kind]
    plain = start("plain", model__kernels="plain", **options)
    fused = start("fused", model__kernels="fused", **options)
    assert_close(fused, plain)


def test_pairs(start: Start, edits: Path, tiny_base: Path) -> None:
    options: Options_ = {
        "model__base": tiny_base, "data__shards": edits, "data__held_out": 0.3, "validation__held_out_samples": 4,
    }  # fmt: skip
    plain = start("plain", model__kernels="plain", **options)
    fused = start("fused", model__kernels="fused", **options)
    assert "3 samples have reference images, for editing" in fused.printed
    assert_close(fused, plain)
    assert fused.curve("held_out/loss") == pytest.approx(plain.curve("held_out/loss"), rel=0.03)


def test_dora(start: Start) -> None:
    whole = start("whole", lora__dora=True)
    assert "plain kernels: lora.dora needs" in whole.printed
    usual = start("usual", model__kernels="plain")
    assert_close(whole, usual, 0.1)
    assert whole.curve("loss") != usual.curve("loss")


def test_the_perceptual_part(start: Start, tmp_path: Path) -> None:
    encoder: Options_ = {
        "flow__perceptual": save_encoder(tmp_path / "encoder"), "flow__perceptual_weight": 2.0,
    }  # fmt: skip
    plain = start("plain", model__kernels="plain", **encoder)
    fused = start("fused", model__kernels="fused", **encoder)
    without = start("without", model__kernels="fused")
    assert_close(fused, plain)
    assert fused.curve("loss")[1] > without.curve("loss")[1] + 0.1


@pytest.mark.parametrize("weights", ["fp8", "fp8_once", "nf4"])
def test_weights_from_the_cache(start: Start, tmp_path: Path, weights: str) -> None:
    options: Options_ = {"model__weights": weights, "model__kernels": "fused"}
    without = start("without", **options)
    first = start("first", model__cache=tmp_path / "cache", **options)
    second = start("second", model__cache=tmp_path / "cache", model__stream=3, **options)
    assert "6 made from the base" in first.printed and "0 made from the base" in second.printed
    assert_close(first, without, 0.01)
    assert_close(second, without, 0.01)
    assert_close(without, start("full", model__kernels="fused"), 0.15)


@pytest.mark.parametrize(
    "where", [{"stream": 4}, {"offload": 4}, {"stream": 3, "offload": 3, "keep": "attention"}]
)
def test_where_things_wait_changes_nothing(start: Start, where: Options_) -> None:
    moved = start(
        "moved", model__kernels="fused", **{f"model__{name}": value for name, value in where.items()}
    )
    assert_close(
        moved, start("still", model__kernels="fused", model__keep=where.get("keep", "everything")), 0.01
    )


def test_resuming_goes_on_as_if_nothing_had_been(start: Start, tmp_path: Path) -> None:
    """With graphs captured anew, fp8, an average and 8-bit moments."""
    options: Options_ = {"model__weights": "fp8", "train__optimizer": "adamw_8bit", "train__ema": 0.9}
    whole = start("whole", **options)
    start("parted", train__steps=STEPS // 2, **options)
    parted = start("parted", resume=True, **options)
    assert_close(parted, whole, 0.01)
    assert (tmp_path / "parted/adapter_ema/adapter_model.safetensors").exists()
