"""Prepared folders as the trainer reads them: exact, checked, readable by any WebDataset reader."""

import hashlib
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from hdl.data import infos as infos_module
from hdl.data.buckets import fit
from hdl.data.infos import Infos
from hdl.data.prepare import Summary
from hdl.data.samples import SampleInfo, info_to_json
from hdl.data.shards import ShardLost, Shards
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.patches import unpatchify
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from tests.data.image_folders import BASE, noise, put

SMALL_SHARDS = 60_000  # bytes; a 64x64 sample takes some 20 kB
Run = Callable[..., Summary]


@pytest.fixture
def out(images: Path, run: Run) -> Path:
    for i in range(5):
        put(images, f"{i}.png", f"thing number {i}", noise(64 + 32 * (i % 2), 64, seed=i))
    return run(shard_bytes=SMALL_SHARDS).out


def one_shard(out: Path) -> Path:
    return sorted(out.glob("shard-*.tar"))[1]


def test_patches_are_exactly_the_resized_image(images: Path, run: Run) -> None:
    original = noise(300, 200)
    put(images, "a.png", image=original)
    sample = Shards(run().out).read(0)
    expected = np.asarray(fit(original, sample.rows, sample.cols))
    assert sample.patches.dtype == torch.uint8
    assert np.array_equal(unpatchify(sample.patches, sample.rows, sample.cols).numpy(), expected)


def test_text_is_what_the_checkpoint_makes_of_the_caption(out: Path) -> None:
    shards = Shards(out)
    checkpoint = open_checkpoint(BASE)
    encoder = PromptEncoder(checkpoint)
    assert len(shards) == len(shards.infos) == 5
    for i in range(5):
        sample = shards.read(i)
        ids = encoder.ids(f"thing number {i}")
        assert sample.caption == f"thing number {i}"
        assert sample.input_ids.dtype == torch.int64 and sample.input_ids.tolist() == ids
        assert sample.text_embeds.dtype == torch.bfloat16
        assert torch.equal(sample.text_embeds, encoder.embed(ids))
        assert len(ids) == shards.infos[i].text_tokens[0]
    empty = encoder.ids(UNCONDITIONAL_PROMPT)
    assert shards.empty.input_ids.tolist() == empty
    assert torch.equal(shards.empty.text_embeds, encoder.embed(empty))


def test_index_counts_and_hashes(out: Path) -> None:
    index = json.loads((out / "index.json").read_text())
    assert index["base"] == {"fingerprint": open_checkpoint(BASE).fingerprint(), "hidden_size": 64}
    assert sum(bucket["samples"] for bucket in index["buckets"]) == index["samples"]["count"] == 5
    assert len(index["shards"]) > 1 and sum(shard["samples"] for shard in index["shards"]) == 5


def test_any_webdataset_reader_iterates_the_shards(out: Path) -> None:
    urls = [str(path) for path in sorted(out.glob("shard-*.tar"))]
    assert len(urls) > 1
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    shards = Shards(out)
    assert [sample["__key__"] for sample in read] == [info.key for info in shards.infos]
    for i, sample in enumerate(read):
        assert sample["json"]["captions"] == [f"thing number {i}"]
        tensors = safetensors.torch.load(sample["safetensors"])
        assert tensors["input_ids"].dtype == torch.int32
        assert torch.equal(tensors["patches"], shards.read(i).patches)


def test_reader_survives_pickling(out: Path) -> None:
    shards = pickle.loads(pickle.dumps(Shards(out)))
    assert shards.read(4).caption == "thing number 4"


def test_dataset_hash_identifies_the_data(images: Path, out: Path, run: Run, tmp_path: Path) -> None:
    before = Shards(out).dataset_hash
    assert Shards(run(out=tmp_path / "again", shard_bytes=SMALL_SHARDS).out).dataset_hash == before
    (images / "3.txt").write_text("something else")
    assert Shards(run(shard_bytes=SMALL_SHARDS).out).dataset_hash != before


def test_no_folder_no_index_no_shards(tmp_path: Path) -> None:
    with pytest.raises(HdlError, match=r"no such folder; expected one made by tools/prepare.py"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(
        HdlError, match=r"no index.json there; expected a folder that tools/prepare.py finished"
    ):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not an index of hdl shards"),
        ('{"format": "hdl-shards", "version": 99}', "format version 99, this hdl reads version 2"),
    ],
)
def test_index_of_something_else(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(HdlError, match=message):
        Shards(tmp_path)


def test_another_base(out: Path) -> None:
    assert len(Shards(out, open_checkpoint(BASE).fingerprint())) == 5
    with pytest.raises(HdlError, match=r"shards of another base: .*the checkpoint given has sha256:dead"):
        Shards(out, "sha256:deadbeef")


def test_shard_cut_off(out: Path) -> None:
    shard = one_shard(out)
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(HdlError) as error:
        Shards(out)
    assert f"{shard}: has 1,000 bytes, index.json says {size:,}: it is cut off" in str(error.value)


def test_shard_missing(out: Path) -> None:
    one_shard(out).unlink()
    with pytest.raises(HdlError, match=r"shard-000001-.*\.tar: missing, but index.json lists it"):
        Shards(out)


def test_shard_disappears_or_shrinks_while_training(out: Path) -> None:
    shards = Shards(out)
    i = next(i for i, info in enumerate(shards.infos) if info.shard == one_shard(out).name)
    with open(one_shard(out), "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardLost, match=f"sample {shards.infos[i].key} .* is damaged"):
        shards.read(i)
    one_shard(out).unlink()
    with pytest.raises(ShardLost, match=f"cannot be read .*sample {shards.infos[i].key} was wanted") as error:
        shards.read(i)
    assert error.value.shard == shards.infos[i].shard


def test_damaged_sample_is_named_and_the_others_stay_readable(out: Path) -> None:
    shards = Shards(out)
    info = shards.infos[2]
    with open(out / info.shard, "r+b") as file:
        file.seek(info.offset + info.size // 2)
        file.write(b"\0rot\0")
    with pytest.raises(HdlError) as error:
        shards.read(2)
    assert f"{info.shard}: sample {info.key} (of 2.png) is damaged" in str(error.value)
    assert shards.read(1).caption == "thing number 1"


def test_damaged_list_of_samples(out: Path) -> None:
    path = next(out.glob("samples-*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b"number 1", b"number 7"))
    with pytest.raises(HdlError, match=r"samples-.*\.jsonl: its bytes are not those that were written"):
        Shards(out)


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("shards", "file", "../shard.tar"),
        ("shards", "file", "/etc/passwd"),
        ("shards", "file", ".."),
        ("samples", "file", "a/b.jsonl"),
        ("empty_prompt", "file", "--help"),
        ("shards", "file", "a b;rm"),
        ("shards", "sha256", "../../x"),
        ("shards", "bytes", -1),
        ("shards", "bytes", "9"),
        ("samples", "count", None),
    ],
)
def test_an_index_that_would_trick(out: Path, where: str, field: str, value: object) -> None:
    rewrite_index(out, where, **{field: value})
    with pytest.raises(HdlError, match=r"index.json: not an index that hdl wrote \(\w+: "):
        Shards(out)


def test_an_index_that_lacks_something(out: Path) -> None:
    index = json.loads((out / "index.json").read_text())
    for name in ("base", "dataset_hash", "samples", "empty_prompt", "shards"):
        (out / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != name}))
        with pytest.raises(HdlError, match=rf"not an index that hdl wrote \(KeyError: '{name}'\)"):
            Shards(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 59_000}, r"line 1 places a sample at 59,000 \+ .* bytes, outside of shard-000000"),
        ({"size": 10**9}, r"line 1 places a sample at .* outside of shard-000000"),
        ({"size": 0}, r"line 1 places a sample at .* outside of shard-000000"),
        (
            {"shard": "../elsewhere.tar"},
            r"line 1 names shard '../elsewhere.tar', which the index does not list",
        ),
    ],
)
def test_samples_outside_of_their_shards(out: Path, change: dict[str, object], message: str) -> None:
    rewrite_first_sample(out, change)
    with pytest.raises(HdlError, match=message):
        Shards(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "../elsewhere.tar"}, "line 1 names shard '../elsewhere.tar'"),
        ({"offset": -1}, "outside of shard-000000"),
        ({"offset": "0"}, "line 1 describes no sample"),
        ({"references": 3}, "line 1 describes no sample"),
    ],
)
def test_a_line_written_in_another_way_is_checked_when_it_is_read(
    out: Path, change: dict[str, object], message: str
) -> None:
    rewrite_first_sample(out, {"key": "first"} | change, separators=(",", ":"))
    shards = Shards(out)
    with pytest.raises(HdlError, match=message):
        shards.read(0)
    assert shards.read(1).caption == "thing number 1"


def test_the_list_of_samples_is_not_as_long_as_the_index_says(out: Path) -> None:
    rewrite_index(out, "samples", count=6)
    with pytest.raises(HdlError, match=r"samples-.*: has 5 samples, the index says 6"):
        Shards(out)


def test_forked_processes_read_side_by_side(out: Path) -> None:
    shards = Shards(out)
    expected = [shards.read(i).caption for i in range(5)]
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            right = all([shards.read(i).caption for i in range(5)] == expected for _ in range(20))
            os._exit(0 if right else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], list[SampleInfo]]:
    """A samples file of 20,000 lines, its record, and what it says."""
    infos = [
        SampleInfo(
            key=f"{i:08d}", shard=f"shard-{i // 100:06d}.tar", offset=i % 100 * 1000, size=900 + i % 100,
            sha256="0" * 64, rows=4 + i % 3, cols=4, references=[(2, 3)] if i % 7 == 0 else [], text_tokens=[9],
            captions=[f'picture "{i}", "shard": "x", "offset": 1, "size": 2, ünd ' + "mehr " * (i % 50)],
            mirrored=bool(i % 2), caption_sha256="1" * 64, embeds_sha256="2" * 64, source=f"{i}.png", view=None,
            style=None, tags=["a"], note=None, image_sha256="3" * 64, recipe="4" * 64,
        )
        for i in range(20_000)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("many") / "samples.jsonl"
    data = "".join(info_to_json(info) + "\n" for info in infos).encode()
    path.write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "count": len(infos)}
    return path, record, infos


SIZES = {f"shard-{i:06d}.tar": 100_000 for i in range(200)}


def test_a_long_list_of_samples_is_a_sequence(
    many: tuple[Path, dict[str, object], list[SampleInfo]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, record, expected = many
    monkeypatch.setattr(infos_module, "BLOCK", 12_345)  # lines across the blocks' ends
    infos = Infos(path, record, SIZES)
    assert len(infos) == 20_000 and list(infos) == expected
    assert [infos[i] for i in (0, 19_999, -1, -20_000, np.int64(77))] == [
        expected[i] for i in (0, 19_999, -1, -20_000, 77)
    ]
    assert infos[100:200:7] == expected[100:200:7] and infos[:-19_990] == expected[:10]
    for i in (20_000, -20_001):
        with pytest.raises(IndexError):
            infos[i]
    copy = pickle.loads(pickle.dumps(infos))
    assert copy[4321] == expected[4321]


def test_a_long_list_of_samples_takes_no_memory(
    many: tuple[Path, dict[str, object], list[SampleInfo]], tmp_path: Path
) -> None:
    path, record, expected = many
    copy = tmp_path / "samples.jsonl"
    copy.write_bytes(path.read_bytes())
    tracemalloc.start()
    infos = Infos(copy, record, SIZES)
    opened, opening = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 20_000 * 8 + 100_000
    assert opening < 8e6  # the text is 17 MB, the objects would be some 60
    copy.unlink()  # as tools/prepare.py does once another list is in its place
    assert infos[9_999] == expected[9_999]


def rewrite_index(out: Path, where: str, **fields: object) -> None:
    index = json.loads((out / "index.json").read_text())
    (index[where][0] if where == "shards" else index[where]).update(fields)
    (out / "index.json").write_text(json.dumps(index))


def rewrite_first_sample(out: Path, change: dict[str, object], **style: Any) -> None:
    """What somebody could write who also writes the hashes."""
    path = next(out.glob("samples-*.jsonl"))
    first, rest = path.read_text().split("\n", 1)
    data = f"{json.dumps(json.loads(first) | change, **style)}\n{rest}".encode()
    path.write_bytes(data)
    rewrite_index(out, "samples", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
