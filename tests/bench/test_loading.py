"""The loading benchmark runs, and prepared data are faster than the pictures they were made of."""

from pathlib import Path

from hdl.bench.loading import measure


def test_prepared_data_are_loaded_faster_than_pictures(tmp_path: Path) -> None:
    told = measure(
        tmp_path, pictures=4, side=768, area=512, images=32, batch_size=4, steps=10, step_seconds=0.1
    )
    assert told["ratio_cpu"] > 1.5, told
    assert told["ours_cpu"] > 60, told
    assert 0 <= told["resident_mib"] < 300, told
    assert 0 <= told["waited"] < 0.5, told  # the first step's is in it, and the machine may be busy
    assert told["waste"] <= 0.02, told
