"""Runs whose loss has a perceptual part: it trains another adapter, the same on any ranks, and nothing of it is saved."""

from pathlib import Path

from tests.engine.conftest import Launch
from tests.engine.test_runs import adapter, assert_same_losses
from tests.flow.encoders import save_encoder


def test_the_encoder_helps_and_is_not_trained(launch: Launch, tmp_path: Path) -> None:
    encoder = {"flow__perceptual": save_encoder(tmp_path / "encoder"), "flow__perceptual_weight": 2.0}
    weights = (tmp_path / "encoder/model.safetensors").read_bytes()
    without, alone = launch("without"), launch("alone", **encoder)
    fused = launch("fused", model__kernels="fused", **encoder)
    spread = launch(
        "spread", processes=2, train__deepspeed="ds_configs/zero3.json", train__micro_batch_size=1, **encoder
    )
    for run in (without, alone, fused, spread):
        assert run.status == 0, run.printed
    assert alone.curve("loss")[1] > without.curve("loss")[1] + 0.1
    assert alone.curve("x0_error/sigma_0.00-0.25")[1] == without.curve("x0_error/sigma_0.00-0.25")[1]
    assert_same_losses(alone, fused)
    assert_same_losses(alone, spread)
    assert adapter(alone).keys() == adapter(without).keys()
    assert (tmp_path / "encoder/model.safetensors").read_bytes() == weights


def test_a_folder_that_is_not_there_ends_the_run_before_it_starts(launch: Launch, tmp_path: Path) -> None:
    run = launch(flow__perceptual="facebook/dinov2-base")
    assert run.status != 0 and "flow.perceptual facebook/dinov2-base: no such folder" in run.printed
    assert "Traceback" not in run.printed and not run.output.exists()
