"""Every file in ds_configs/ trains what the others train, on two ranks; what DeepSpeed cannot do is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hdl.config import Train
from hdl.engine.sharding import check_optimizer
from hdl.errors import HdlError
from tests.engine.conftest import REPOSITORY
from tests.engine.forked import Server
from tests.engine.test_sharded_runs import curves

CONFIGS = REPOSITORY / "ds_configs"
STRATEGIES = sorted(path.stem for path in CONFIGS.glob("*.json"))
# Says what a rank holds of the frozen weights, and that each was gone before the next was read.
COUNTING = """
import weakref
import hdl.engine.loop as loop

plain = loop.load_partitioned

def counted(checkpoint, *settings):
    read_all = checkpoint.read_all

    def reading(*arguments):
        for name, value in read_all(*arguments):
            whole, passed_on = weakref.ref(value), [value]
            del value
            yield name, passed_on.pop()
            assert whole() is None, f"{name} is still whole"

    checkpoint.read_all = reading
    model = plain(checkpoint, *settings)
    held = sum(p.data.nbytes + p.ds_tensor.nbytes for p in model.parameters())
    whole = sum(p.ds_numel * p.element_size() for p in model.parameters())
    print(f"share {held / whole:.2f}", flush=True)
    return model

loop.load_partitioned = counted
"""


@pytest.fixture(scope="module")
def memo() -> dict[str, list[list[float]]]:
    return {}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains_what_zero2_trains(
    strategy: str, dtype: str, server: Server, described: Callable[..., list[str]], tmp_path: Path,
    memo: dict[str, list[list[float]]],
) -> None:  # fmt: skip
    def run(name: str) -> list[list[float]]:
        options = {"model__dtype": dtype, "train__deepspeed": CONFIGS / f"{name}.json", "train__steps": 3}
        job = server.start(described(name, data__held_out=0.3, validation__held_out_samples=2, **options))
        assert job.wait() == 0, job.printed
        return curves(tmp_path / name)

    wanted = memo.setdefault(dtype, run("zero2")) if dtype not in memo else memo[dtype]
    for found, expected in zip(run(strategy), wanted):
        assert found == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 0.02)


def test_zero3_is_built_share_by_share(server: Server, described: Callable[..., list[str]]) -> None:
    job = server.start(
        described("built", train__deepspeed=CONFIGS / "zero3.json", train__steps=3), first=COUNTING
    )
    assert job.wait() == 0, job.printed
    assert job.printed.count("share 0.5") == 2, job.printed


@pytest.mark.parametrize("option", ["weights", "nontrainable_weights", "gradients"])
def test_deepspeeds_own_quantizing_is_refused(option: str, tmp_path: Path) -> None:
    strategy = json.loads((CONFIGS / "zero3.json").read_text())
    strategy["zero_optimization"][f"zero_quantized_{option}"] = True
    file = tmp_path / "quantized.json"
    file.write_text(json.dumps(strategy))
    with pytest.raises(HdlError, match=rf"zero_quantized_{option}.*model\.shard.*zero2\.json"):
        check_optimizer(Train(deepspeed=file), torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_readme_says_when_to_choose_it(strategy: str) -> None:
    assert f"| `{strategy}.json` |" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
