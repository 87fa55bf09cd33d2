"""What a run is told of memory before it starts. The GPU is numbers here: nothing is allocated."""

from pathlib import Path
from typing import Any

import pytest

from hdl.config import Lora, Run, load_run
from hdl.data.samples import SampleInfo
from hdl.engine.budget import Budget, heaviest, settle, strategy_of
from hdl.errors import HdlError
from hdl.memory.plan import GIB, Work, need
from hdl.o1.config import read_config
from hdl.o1.layout import Segment

REAL = read_config(Path(__file__).parents[1] / "o1/o1-8b-config.json")


def info(rows: int, cols: int, text: int) -> SampleInfo:
    unlooked_at: dict[str, Any] = dict.fromkeys(SampleInfo.__dataclass_fields__)
    return SampleInfo(
        **unlooked_at
        | {"rows": rows, "cols": cols, "text_tokens": [text], "references": [], "empty_tokens": 0}
    )


INFOS = [info(32, 32, 160), info(40, 26, 90), info(32, 32, 200)]


def a_run(*flags: str) -> Run:
    return load_run(["--model.base", "b", "--data.shards", "s", "--save.output", "o", *flags])


def gib(size: float, fp8: bool = True) -> Budget:
    return Budget(size * GIB, fp8)


def test_the_heaviest_micro_batch_counts() -> None:
    assert heaviest(INFOS, 1) == Work.of([Segment(200, 32, 32)])
    assert heaviest(INFOS, 2) == Work.of([Segment(200, 32, 32), Segment(160, 32, 32)])
    assert heaviest(INFOS[:1], 3) == Work.of([Segment(160, 32, 32)] * 3)


def test_a_run_that_fits_is_left_as_it_is_and_told_what_it_takes() -> None:
    run = a_run("--train.batch_size", "1")
    settled, line = settle(run, REAL, INFOS, 1, gib(79))
    assert settled == run
    assert line.startswith("memory: about 21.") and "of 79.0 GiB" in line
    assert "weights 13.3" in line and "activations" in line


def test_one_that_does_not_is_refused_with_settings_that_would() -> None:
    with pytest.raises(
        HdlError, match=r"needs about 21\.\d GiB .* may take 15\.0; .*model\.weights fp8_once"
    ):
        settle(a_run("--train.batch_size", "1"), REAL, INFOS, 1, gib(15))


def test_auto_takes_the_fastest_that_fits() -> None:
    run = a_run("--train.batch_size", "1", "--model.memory", "auto")
    wide, _ = settle(run, REAL, INFOS, 1, gib(79))
    assert wide.model.weights == "fp8" and wide.model.keep == "everything"
    tight, line = settle(run, REAL, INFOS, 1, gib(12))
    assert tight.model.weights == "fp8_once" and len(set(tight.model.keep)) == 2
    assert "products x" in line or "attention x" in line
    old, _ = settle(run, REAL, INFOS, 1, gib(15, fp8=False))
    assert old.model.weights == "nf4"  # without fp8 arithmetic
    smaller, line = settle(run, REAL, INFOS, 1, gib(5))
    assert smaller.model.stream and f"model.stream {smaller.model.stream}" in line
    smallest, _ = settle(run, REAL, INFOS, 1, gib(3.2))
    assert smallest.train.optimizer == "adamw_8bit", "its own optimizer leaves too little room"
    assert run.model.weights == "full" and run.train.optimizer == "adamw"


def test_what_nothing_fits_is_said() -> None:
    with pytest.raises(HdlError, match=r"no settings .* fit 2\.0 GiB: the least is \d\.\d GiB"):
        settle(a_run("--model.memory", "auto"), REAL, INFOS, 1, gib(2))


def test_ranks_share_the_optimizers_state() -> None:
    run = a_run("--train.batch_size", "8", "--train.micro_batch_size", "1")
    alone, shared = (float(settle(run, REAL, INFOS, n, gib(79))[1].split()[2]) for n in (1, 8))
    # master, moments, and what of the gradient is made of them: 18 bytes a number, as printed to a tenth
    assert alone - shared == pytest.approx(7 / 8 * 18 * 87_293_952 / 2**30, abs=0.1)


def test_the_rank_counts() -> None:
    run = a_run("--train.batch_size", "1")
    lines = [
        settle(run.model_copy(update={"lora": Lora(rank=r)}), REAL, INFOS, 1, gib(79))[1] for r in (16, 128)
    ]
    assert float(lines[1].split()[2]) > float(lines[0].split()[2]) + 3


def test_an_average_counts_four_bytes_a_trained_number_over_the_ranks() -> None:
    run = a_run("--train.batch_size", "8", "--train.micro_batch_size", "1")
    averaging = a_run("--train.batch_size", "8", "--train.micro_batch_size", "1", "--train.ema", "0.99")
    for world in (1, 4):
        adapters = [
            need(REAL, 32, heaviest(INFOS, 1), strategy_of(r, REAL, world)).adapter for r in (run, averaging)
        ]
        assert adapters[1] - adapters[0] == pytest.approx(4 * 87_293_952 / world, abs=1)


def test_auto_leaves_room_for_the_average() -> None:
    auto = ["--train.batch_size", "1", "--lora.rank", "256", "--model.memory", "auto"]
    for size in (20.0, 24.0, 32.0):
        run, _ = settle(a_run(*auto, "--train.ema", "0.99"), REAL, INFOS, 1, gib(size))
        assert need(REAL, 256, heaviest(INFOS, 1), strategy_of(run, REAL, 1)).peak <= size * GIB
