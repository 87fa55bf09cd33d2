"""An epoch over a failing network, in small: whole and right, within the cache. Speed is for the real size."""

from pathlib import Path

from hdl.bench.shard_server import Faults
from hdl.bench.streaming_data import measure


def test_every_sample_comes_once_however_the_server_fails(tmp_path: Path) -> None:
    faults = Faults(error=0.15, stall=0.03, truncate=0.1, damage=0.05, seed=3)
    result = measure(
        tmp_path,
        shards=30,
        samples=4,
        side=4,
        rate=None,
        faults=faults,
        window=4,
        cached_shards=10,
        stall=0.5,
    )
    for run in (result["clean"], result["faulty"]):
        assert (run["samples"], run["wrong"], run["twice"], run["missing"]) == (120, 0, 0, 0)
        assert 0 < run["cache_most"] <= result["cache_bound"]
    assert result["clean"]["failures"] == []
    told = "\n".join(result["faulty"]["failures"])
    for kind in ("HTTP status 500", "nothing came", "not completed", "index says"):
        assert kind in told
    assert 0 < result["ratio"] < 1
