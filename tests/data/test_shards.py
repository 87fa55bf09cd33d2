"""Prepared folders as the trainer reads them: exact, checked, readable by any WebDataset reader."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from image_folders import BASE, noise, put

from hdl.data.buckets import fit
from hdl.data.prepare import Summary
from hdl.data.shards import Shards
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.patches import unpatchify
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder

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
    with pytest.raises(HdlError, match=f"sample {shards.infos[i].key} .* is damaged"):
        shards.read(i)
    one_shard(out).unlink()
    with pytest.raises(HdlError, match=f"cannot be read .*sample {shards.infos[i].key} was wanted"):
        shards.read(i)


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
