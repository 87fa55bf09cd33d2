from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.report.curves import BANDS, Reporter, StepReport, band_sums


def test_errors_are_summed_in_bands_of_sigma() -> None:
    sigmas = torch.tensor([0.01, 0.3, 0.26, 0.9999, 1.0, 0.75])
    errors = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 1e-9])
    sums = band_sums(sigmas, errors)
    assert sums.dtype == torch.float64 and sums.shape == (2, BANDS)
    assert sums[0].tolist() == [1.0, 6.0, 0.0, pytest.approx(24.0 + 1e-9, abs=1e-12)]
    assert sums[1].tolist() == [1, 2, 0, 3]


def test_an_error_that_is_not_finite_stays_in_its_band() -> None:
    sums = band_sums(torch.tensor([0.1, 0.6]), torch.tensor([float("inf"), 3.0]))
    assert sums[0].tolist() == [float("inf"), 0.0, 3.0, 0.0]


def test_a_step_is_reported_with_its_own_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(tmp_path, 0, 2)
    bands = band_sums(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([2.0, 4.0, 5.0]))
    for step, seconds, images in ((1, 0.5, 4), (2, 2.0, 6)):
        reporter.step(
            step, StepReport(step / 10, bands, 1.5, 1e-3, images, 1000, seconds, 7.0, waited=0.05 * step)
        )
    reporter.close()
    events = EventAccumulator(str(tmp_path)).Reload()

    def curve(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    assert curve("loss") == {1: pytest.approx(0.1), 2: pytest.approx(0.2)}
    assert curve("speed/images_per_second") == {1: 8.0, 2: 3.0}
    assert curve("speed/tokens_per_second") == {1: 2000.0, 2: 500.0}
    assert curve("x0_error/sigma_0.00-0.25") == {1: 3.0, 2: 3.0}
    assert curve("x0_error/sigma_0.75-1.00") == {1: 5.0, 2: 5.0}
    assert "x0_error/sigma_0.25-0.50" not in events.Tags()["scalars"]
    said = "2 steps, median 1.250 s a step (4.00 images/s, 800 tokens/s), 6.0% of the time waiting for data, peak 7.0 GiB"
    assert said in capsys.readouterr().out
