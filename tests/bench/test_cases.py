from pathlib import Path

import pytest
import torch

from hdl.bench.cases import RATIOS, all_cases, decoder_weights, packs, useful_flops
from hdl.o1.checkpoint import expected_shapes
from hdl.o1.config import O1Config, read_config

CONFIG_8B = Path(__file__).parents[1] / "o1/o1-8b-config.json"


@pytest.fixture(scope="module")
def big() -> O1Config:
    return read_config(CONFIG_8B)


def test_the_weights_counted_are_the_decoders_linears(big: O1Config, tiny_base: Path) -> None:
    for config in (big, read_config(tiny_base / "config.json")):
        linears = [shape for name, shape in expected_shapes(config).items() if "_proj." in name]
        assert decoder_weights(config) == sum(outputs * inputs for outputs, inputs in linears)
    assert decoder_weights(big) == pytest.approx(6.946e9, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "tokens", "sequence"), [("1024x1", 1184, 1184), ("1024x4", 4736, 1184), ("2048x1", 4256, 4256)]
)
def test_useful_work_is_the_published_formula(big: O1Config, name: str, tokens: int, sequence: int) -> None:
    segments = all_cases(tiny=False)[name].segments(0)
    assert sum(s.tokens for s in segments) == tokens
    assert {s.tokens for s in segments} == {sequence} and {s.text for s in segments} == {160}
    attention = 3.5 * 4 * sequence**2 * 32 * 128 * 36 * (tokens / sequence)
    assert useful_flops(big, segments) == pytest.approx(4 * 6.946e9 * tokens + attention, rel=1e-4)


def test_the_mixed_stream_is_as_various_as_promised() -> None:
    case = all_cases(tiny=False)["mixed"]
    steps = [case.segments(step) for step in range(12)]
    segments = [s for step in steps for s in step]
    assert all(len(step) == 4 for step in steps)
    assert len({(s.rows, s.cols) for s in segments}) == len(RATIOS) >= 10
    assert all(0.9 * 1024 <= s.patches <= 1024 for s in segments)
    assert all(20 <= s.text <= 400 for s in segments)
    assert max(s.text for s in segments) > 350 and min(s.text for s in segments) < 70
    assert len({tuple(step) for step in steps}) == 12, "every step is another"
    assert case.segments(3) == steps[3], "and the same when asked again"


def test_a_steps_samples_do_not_depend_on_how_they_are_packed() -> None:
    case = all_cases(tiny=True)["mixed"]
    samples = case.samples(2, dim=8)
    [together] = packs(samples, together=True, pin=False)
    alone = packs(case.samples(2, dim=8), together=False, pin=False)
    assert [b.places for b in alone] == [[0], [1], [2], [3]]
    assert torch.equal(together.patches, torch.cat([b.patches for b in alone]))
    assert torch.equal(together.text, torch.cat([b.text for b in alone]))
    assert {b.global_patches for b in [together, *alone]} == {len(together.patches)}
    assert together.patches.dtype == torch.uint8 and together.text.dtype == torch.bfloat16
    assert 100 < together.patches.float().mean() < 155, "pixels are random"
    assert not torch.equal(together.patches[:4], case.samples(3, dim=8)[0].patches[:4])
