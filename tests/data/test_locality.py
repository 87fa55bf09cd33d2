"""A run is warned when it mixes over more shards from elsewhere than their cache holds, and told what to set."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hdl.bench.shard_server import ShardServer
from hdl.bench.streaming_data import write_shards
from hdl.config import Data
from hdl.data.locality import GIB, what_thrashes
from hdl.data.mixture import open_mixture

SHARDS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "shards"
    write_shards(folder, SHARDS, 4, side=2, seed=0)
    return folder


@pytest.fixture
def warning(made: Path, tmp_path: Path) -> Iterator[Callable[..., str | None]]:
    """what_thrashes for these shards behind a server and a cache for so many of them."""
    shard = max(path.stat().st_size for path in made.glob("shard-*"))
    [listed] = made.glob("samples-*")
    with ShardServer(made) as server:

        def warning(cached: float, window: int | None = None, url: str = server.url) -> str | None:
            gib = (listed.stat().st_size + cached * shard) / GIB
            data = Data(shards=url, cache=tmp_path / "cache", cache_gib=gib, window=window)
            return what_thrashes(data, open_mixture(data, None))

        yield warning


def test_all_shards_are_mixed_where_no_window_is_set(warning: Callable[..., str | None]) -> None:
    said = warning(cached=6.1)
    assert said and said.startswith("warning: data.window is unset, so samples are mixed over all 12 shards")
    assert "holds 51%" in said and "Set data.window 3, or data.cache_gib 1 or more" in said
    assert warning(cached=SHARDS + 0.1) is None


def test_a_window_that_fits_is_good_and_so_is_the_one_advised(warning: Callable[..., str | None]) -> None:
    advised = re.search(r"Set data.window (\d+)", warning(cached=8.1) or "")
    assert advised and warning(cached=8.1, window=int(advised[1])) is None
    assert warning(cached=8.1, window=8) is None
    said = warning(cached=8.1, window=9)
    assert said and "data.window 9 mixes samples over 9 shards from elsewhere at a time" in said
    assert "Set data.window 4" in said


def test_shards_here_need_no_cache(warning: Callable[..., str | None], made: Path) -> None:
    assert warning(cached=2.1, url=str(made)) is None
