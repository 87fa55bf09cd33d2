"""The measurement of prepare runs, on a small scale: every image is prepared, and both sides are timed."""

from pathlib import Path

from hdl.bench.prepare_speed import measure, measure_many
from hdl.data.shards import Shards


def test_photographs(tmp_path: Path) -> None:
    found = measure(tmp_path / "m", images=6, width=800, height=600, area=256, workers=0)
    assert found["images"] == 6 and found["bucket"] == [288, 224]
    assert found["ratio"] == found["images_a_second"] / found["plain_images_a_second"] > 0
    infos = Shards(tmp_path / "m" / "shards").infos
    assert [(info.cols * 32, info.rows * 32) for info in infos] == [(288, 224)] * 6
    assert len({info.image_sha256 for info in infos}) == 4


def test_many(tmp_path: Path) -> None:
    found = measure_many(tmp_path / "m", images=300, workers=0)
    assert found["images"] == len(Shards(tmp_path / "m" / "shards").infos) == 300
    assert 0 < found["seconds_unchanged"] < found["seconds_new"]
