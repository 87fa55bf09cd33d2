"""Shards that lie elsewhere: what comes over a network or a pipe is right, or it is not trained on."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from hdl.bench.shard_server import Faults, ShardServer
from hdl.bench.streaming_data import watched, write_shards
from hdl.data import elsewhere, fetch, prefetch
from hdl.data.fetch import ShardLost
from hdl.data.shards import CacheOptions, Shards
from hdl.data.storage import Url
from hdl.errors import HdlError

SHARDS, SAMPLES = 6, 4
ROOMY = 0.01  # GiB


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "shards"
    write_shards(folder, SHARDS, SAMPLES, side=2, seed=0)
    return folder


@pytest.fixture
def server(made: Path) -> Iterator[ShardServer]:
    with ShardServer(made) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited between tries."""
    waits: list[float] = []
    monkeypatch.setattr(fetch, "sleep", waits.append)
    return waits


@pytest.fixture
def options(tmp_path: Path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", ROOMY, stall=5.0)


def shard_names(shards: Shards) -> list[str]:
    return [shard["file"] for shard in shards.index["shards"]]


def is_all_of(shards: Shards, made: Path) -> bool:
    here = Shards(made)
    assert len(shards) == len(here) == SHARDS * SAMPLES and shards.dataset_hash == here.dataset_hash
    return all(torch.equal(shards.read(i).patches, here.read(i).patches) for i in range(len(here)))


def cached(options: CacheOptions) -> set[str]:
    return {path.name for path in options.folder.iterdir()}


def test_a_web_server_gives_the_same_samples_and_is_asked_once_for_a_shard(
    server: ShardServer, made: Path, options: CacheOptions
) -> None:
    shards = Shards(server.url, cache=options)
    assert is_all_of(shards, made) and is_all_of(shards, made)
    assert set(server.asked.values()) == {1} and len(server.asked) == SHARDS + 3
    assert shards.failures == []
    assert is_all_of(Shards(server.url + "/?signature=of-each-file", cache=options), made)
    assert max(server.asked[name] for name in shard_names(shards)) == 1  # by another run, from the cache


def test_what_fails_is_asked_for_again_until_it_is_right(
    server: ShardServer, made: Path, tmp_path: Path, waits: list[float]
) -> None:
    server.faults = Faults(error=0.3, stall=0.05, truncate=0.15, damage=0.15, seed=1)
    shards = Shards(server.url, cache=CacheOptions(tmp_path / "cache", ROOMY, stall=0.5, tries=20))
    assert is_all_of(shards, made)
    met = {server.faults.of(name, n)[0] for name, asked in server.asked.items() for n in range(asked)}
    assert met == {"status", "reset", "stall", "truncate", "damage", ""}
    told = "\n".join(shards.failures)
    for kind in ("HTTP status 500", "nothing came for 0.125 s, the rest", "not completed", "index says"):
        assert kind in told


def test_a_shard_is_lost_after_the_tries_and_then_at_once(
    server: ShardServer, made: Path, options: CacheOptions, waits: list[float]
) -> None:
    shards = Shards(server.url, cache=options)
    name = shard_names(shards)[2]
    server.faults = Faults(error=1.0)
    for _ in range(2):
        with pytest.raises(ShardLost, match=rf"{server.url}/{name}: cannot be read in 5 tries") as error:
            shards.read(2 * SAMPLES)
        assert error.value.shard == name
    assert server.asked[name] == 5
    assert len(waits) == 4
    assert all(0.05 * 5**i <= wait <= 0.1 * 5**i for i, wait in enumerate(waits))
    server.faults = Faults()
    shards.read(0)
    with pytest.raises(ShardLost):
        shards.read(2 * SAMPLES + 1)


def test_a_shard_with_another_checksum_never_gives_a_sample(
    server: ShardServer, options: CacheOptions, waits: list[float]
) -> None:
    shards = Shards(server.url, cache=options)
    record = shards.index["shards"][1]
    before = cached(options)
    server.faults = Faults(damage=1.0)
    with pytest.raises(ShardLost, match=rf"have sha256 [0-9a-f]{{64}}, the index says {record['sha256']}"):
        shards.read(SAMPLES)
    assert server.asked[record["file"]] == 5
    assert cached(options) == before


def test_a_file_that_is_longer_than_the_index_says_is_not_taken(
    made: Path, tmp_path: Path, options: CacheOptions, waits: list[float]
) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with ShardServer(tmp_path) as server:
        shards = Shards(server.url, cache=options)
        name = shard_names(shards)[0]
        with open(tmp_path / name, "ab") as file:
            file.write(b"more")
        with pytest.raises(ShardLost, match="it is longer than"):
            shards.read(0)


def test_answers_that_another_try_would_not_change(
    server: ShardServer, options: CacheOptions, waits: list[float], made: Path
) -> None:
    with pytest.raises(HdlError, match=rf"{server.url}/nowhere/index.json: cannot be read: HTTP status 404"):
        Shards(server.url + "/nowhere", cache=options)
    server.key = "open sesame"
    with pytest.raises(HdlError, match=rf"{server.url}/index.json: cannot be read: HTTP status 403"):
        Shards(server.url, cache=options)
    assert server.asked == {"nowhere/index.json": 1, "index.json": 1} and not waits
    with_key = CacheOptions(options.folder, ROOMY, storage={"headers": {"X-Key": "open sesame"}})
    assert is_all_of(Shards(server.url, cache=with_key), made)


def test_nobody_listens(options: CacheOptions, waits: list[float], made: Path) -> None:
    with ShardServer(made) as server:
        url = server.url
    with pytest.raises(HdlError, match=rf"{url}/index.json: cannot be read in 5 tries.*Connect"):
        Shards(url, cache=options)


def test_index_of_something_else(
    tmp_path: Path, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardServer(tmp_path) as server:
        (tmp_path / "index.json").write_text("<html>")
        with pytest.raises(HdlError, match=rf"{server.url}/index.json: not readable as JSON"):
            Shards(server.url, cache=options)
        monkeypatch.setattr(elsewhere, "INDEX_LIMIT", 5)
        with pytest.raises(HdlError, match="index.json: cannot be read: it is longer than 5 bytes"):
            Shards(server.url, cache=options)


def test_a_cache_for_less_than_two_shards(server: ShardServer, tmp_path: Path) -> None:
    with pytest.raises(HdlError, match=r"data.cache_gib 0.0001 is too small.*set at least 0\.000"):
        Shards(server.url, cache=CacheOptions(tmp_path / "cache", 0.0001))


def test_many_readers_of_a_small_cache_stay_within_it(
    server: ShardServer, made: Path, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in made.glob("*.jsonl")] + 3 * [
        max(path.stat().st_size for path in made.glob("*.tar"))
    ]
    options = CacheOptions(tmp_path / "cache", sum(sizes) / 2**30)
    shards, here = Shards(server.url, cache=options), Shards(made)
    wrong: list[int] = []

    def read(first: int) -> None:
        for i in range(len(here)):
            j = (first + 5 * i) % len(here)
            if not torch.equal(shards.read(j).patches, here.read(j).patches):
                wrong.append(j)

    with watched(options.folder) as most:
        threads = [threading.Thread(target=read, args=(4 * k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            shards.prefetch(shard_names(shards))
            time.sleep(0.01)
    assert wrong == []
    assert max(sizes) < most[0] <= sum(sizes)
    assert max(server.asked.values()) > 1  # it was too small for them all


def test_wanted_shards_are_fetched_ahead_in_order_and_as_many_as_fit(
    server: ShardServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = max(path.stat().st_size for path in made.glob("*.tar"))
    samples = next(made.glob("*.jsonl")).stat().st_size
    shards = Shards(server.url, cache=CacheOptions(tmp_path / "cache", (samples + 4.5 * one) / 2**30))
    names = [shard_names(shards)[i] for i in (4, 0, 5, 2, 1, 3)]
    monkeypatch.setattr(prefetch, "AT_ONCE", 1)
    shards.prefetch(names)
    _until(lambda: server.asked[names[2]])
    _until(lambda: shards.home.ahead._threads == 0)  # type: ignore[union-attr]
    for i in (4, 0, 5):
        shards.read(SAMPLES * i)
    assert list(server.asked)[3:] == names[:3]
    assert {server.asked[name] for name in names[:3]} == {1}


def test_what_is_wanted_ahead_can_change_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "AT_ONCE", 1)
    done: list[str] = []
    go_on = threading.Event()

    def do(name: str) -> None:
        go_on.wait(20)
        done.append(name)

    ahead = prefetch.Ahead(do)
    ahead.set(["a", "b", "c"])
    _until(lambda: "a" in ahead._doing)
    ahead.set(["c", "a", "d"])
    go_on.set()
    _until(lambda: len(done) == 3)
    assert done == ["a", "c", "d"]
    ahead.set(["e"])  # after its thread has ended
    _until(lambda: done[-1] == "e")


def test_what_goes_wrong_ahead_is_told_when_it_is_read(
    server: ShardServer, options: CacheOptions, waits: list[float]
) -> None:
    shards = Shards(server.url, cache=options)
    server.faults = Faults(error=1.0)
    shards.prefetch(shard_names(shards)[:1])
    _until(lambda: shard_names(shards)[0] in shards.home.lost)  # type: ignore[union-attr]
    server.faults = Faults()
    with pytest.raises(ShardLost, match="in 5 tries"):
        shards.read(0)
    assert server.asked[shard_names(shards)[0]] == 5


def test_a_shard_that_rots_in_the_cache_is_fetched_again(
    server: ShardServer, options: CacheOptions, made: Path
) -> None:
    shards = Shards(server.url, cache=options)
    shards.read(0)
    info = shards.infos[0]
    with open(options.folder / f"{shards.records[info.shard]['sha256']}.tar", "r+b") as file:
        file.seek(info.offset + info.size // 2)
        file.write(b"\0rot\0")
    assert is_all_of(shards, made)
    assert server.asked[info.shard] == 2


def test_a_list_of_samples_that_rots_in_the_cache_is_fetched_again(
    server: ShardServer, options: CacheOptions, made: Path
) -> None:
    Shards(server.url, cache=options)
    samples = next(options.folder.glob("*.jsonl"))
    samples.write_bytes(samples.read_bytes().replace(b"picture 1", b"picture 7"))
    assert is_all_of(Shards(server.url, cache=options), made)


def test_any_url_that_fsspec_opens(made: Path, options: CacheOptions) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(made), "/bucket/set", recursive=True)
    try:
        assert is_all_of(Shards("memory://bucket/set", cache=options), made)
        with pytest.raises(
            HdlError, match="memory://bucket/nothing/index.json: cannot be read: FileNotFound"
        ):
            Shards("memory://bucket/nothing", cache=options)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_folder_here_is_read_in_place(
    made: Path, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(made.parent))
    for location in (made, str(made), f"file://{made}", f"~/{made.name}"):
        assert is_all_of(Shards(location, cache=options), made)
    assert not options.folder.exists()


def test_urls_that_cannot_be_read_here(options: CacheOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HdlError, match="fsspec knows no quantum://; give a folder, a URL such as s3://"):
        Shards("quantum://set", cache=options)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(HdlError, match=r"s3://bucket/set: reading s3:// needs .* pip install s3fs"):
        Shards("s3://bucket/set", cache=options)


def test_messages_show_no_secrets() -> None:
    shown = Url("https://me:secret@host/set/?signature=abc").shown("index.json")
    assert shown == "https://host/set/index.json"


def test_a_pipe_gives_the_same_samples(made: Path, options: CacheOptions) -> None:
    assert is_all_of(Shards(f"pipe:cat {made}/{{file}}", cache=options), made)


def test_a_command_that_fails_is_quoted(made: Path, options: CacheOptions, waits: list[float]) -> None:
    with pytest.raises(HdlError, match=r"exit status 3: no such host") as error:
        Shards("pipe:echo no such host >&2; echo {file}; exit 3", cache=options)
    assert "echo index.json; exit 3: cannot be read in 5 tries" in str(error.value)
    with pytest.raises(HdlError, match=r"the command names no {file}"):
        Shards("pipe:cat index.json", cache=options)


def test_a_command_that_ends_too_early_and_says_nothing(
    made: Path, options: CacheOptions, waits: list[float]
) -> None:
    command = f"pipe:case {{file}} in *.tar) head -c 100 {made}/{{file}};; *) cat {made}/{{file}};; esac"
    with pytest.raises(ShardLost, match="it ended after 100 of"):
        Shards(command, cache=options).read(0)


def test_a_command_that_falls_silent_is_ended_with_its_children(
    made: Path, tmp_path: Path, waits: list[float]
) -> None:
    command = f"pipe:echo $$ >> {tmp_path}/pids; head -c 9 {made}/{{file}}; sleep 60; true"
    with pytest.raises(HdlError, match=r"in 2 tries, .*nothing came for 0.3 s"):
        Shards(command, cache=CacheOptions(tmp_path / "cache", ROOMY, stall=0.3, tries=2))
    groups = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(groups) == 2
    for group in groups:
        _until(lambda group=group: not _alive(group))


def test_names_in_an_index_cannot_become_commands_or_paths(
    made: Path, tmp_path: Path, options: CacheOptions
) -> None:
    index = json.loads((made / "index.json").read_text())
    index["samples"]["file"] = "$(touch stolen)"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(HdlError, match="is no file name"):
        Shards(f"pipe:cd {tmp_path}; cat {{file}}", cache=options)
    assert not (tmp_path / "stolen").exists()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HDL_CACHE", str(tmp_path))
    assert CacheOptions().folder == tmp_path
    monkeypatch.delenv("HDL_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert CacheOptions().folder == Path("/home/me/.cache/hdl/shards")


def test_cached_files_are_named_by_what_they_hold(server: ShardServer, options: CacheOptions) -> None:
    shards = Shards(server.url, cache=options)
    shards.read(0)
    for path in options.folder.glob("*.*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def _until(condition) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Shards that take a while at RATE, so that some of each has come when it breaks off."""
    write_shards(tmp_path / "large", 3, 4, side=10, seed=0)
    return tmp_path / "large"


RATE = 20e6  # bytes a second
LONG_ENOUGH = 0.5  # seconds in which a reader on a busy machine, too, has taken what came


@pytest.mark.parametrize("ranges", [True, False], ids=["parts can be had", "whole files only"])
def test_a_try_goes_on_where_the_one_before_broke_off(
    large: Path, options: CacheOptions, waits: list[float], ranges: bool
) -> None:
    with ShardServer(large, Faults(), RATE, ranges=ranges) as server:
        server.key = "secret"  # which goes with every request, those for the rest as well
        fetching = replace(options, storage={"headers": {"X-Key": "secret"}})
        shards, here = Shards(server.url, cache=fetching), Shards(large)
        names = shard_names(shards)
        server.faults, server.lingers = FirstOnly(truncate=1.0), LONG_ENOUGH
        assert all(torch.equal(shards.read(i).patches, here.read(i).patches) for i in range(len(here)))
        assert [server.asked[name] for name in names] == [2] * len(names)
        assert [server.resumed[name] for name in names] == [int(ranges)] * len(names)
        assert len(shards.failures) == len(waits) == len(names)


def test_a_silence_in_mid_file_costs_no_more_than_part_of_it(
    large: Path, options: CacheOptions, waits: list[float]
) -> None:
    """A second connection brings the rest, beside the first: no try has failed."""
    with ShardServer(large, Faults(), RATE) as server:
        shards = Shards(server.url, cache=replace(options, stall=8.0))
        name = shard_names(shards)[0]
        server.faults = FirstOnly(stall=1.0)
        began = time.monotonic()
        assert torch.equal(shards.read(0).patches, Shards(large).read(0).patches)
        assert 2.0 <= time.monotonic() - began < 8.0 and waits == []
        assert (server.asked[name], server.resumed[name]) == (2, 1)
        assert shards.failures == [f"{name}: nothing came for 2 s, the rest was asked for again beside it"]


class FirstOnly(Faults):
    """Of a file's requests, only the first one fails, in the middle."""

    def of(self, name: str, asked: int) -> tuple[str, float]:
        return (super().of(name, asked)[0], 0.5) if asked == 0 else ("", 0.5)


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_parts_of_different_files_are_never_put_together(
    large: Path, options: CacheOptions, waits: list[float], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half comes from a file that is then replaced by the one that the index lists."""
    here = Shards(large).read(0).patches
    with ShardServer(large, Faults(), RATE) as server:
        shards = Shards(server.url, cache=replace(options, stall=8.0))
        name = shard_names(shards)[0]
        right = (large / name).read_bytes()
        (large / name).write_bytes(bytes(len(right)))
        server.faults, server.lingers = FirstOnly(**{fault: 1.0}), LONG_ENOUGH
        asked_again = server.count

        def mend(name: str) -> int:
            if (number := asked_again(name)) == 1:
                (large / name).write_bytes(right)
            return number

        monkeypatch.setattr(server, "count", mend)
        assert torch.equal(shards.read(0).patches, here)
        assert (server.asked[name], server.resumed[name]) == (3, 1)
        assert "the index says" in shards.failures[1] and len(shards.failures) == 2


def test_the_rest_of_a_file_can_be_had_from_any_url() -> None:
    fsspec.filesystem("memory").pipe("/parts/file", bytes(range(100)))
    stream = Url("memory://parts").open("file", 1.0, start=90)
    assert stream.in_parts and stream.start == 90 and stream.read() == bytes(range(90, 100))
