"""What a step's batches hold, however they are cut, spread and read."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdl.data import batches as module
from hdl.data.batches import Batch, Batches
from hdl.data.mirror import mirrored
from hdl.data.mixture import Mixture
from hdl.data.packing import Packs
from hdl.data.picks import Draws
from hdl.data.prepare import Options, prepare
from hdl.data.reading import Reader
from hdl.data.shards import Shards
from hdl.data.steps import BySamples, ByTokens, Steps
from hdl.errors import HdlError
from hdl.o1.patches import patchify
from tests.data.fakes import FakeShards, info, mixture, several, source
from tests.data.image_folders import noise, put


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    for i, (width, height) in enumerate([(64, 64), (96, 32), (32, 96), (64, 64), (64, 32)]):
        put(images, f"{i}.png", f"picture number {i} " + "more words " * i, noise(width, height, seed=i))
    prepare(images, out, Path(__file__).parents[1] / "golden" / "o1-tiny", options=Options(area=64))
    return Shards(out)


def reader_of(
    mixed: Mixture, rank: int = 0, world: int = 1, micro: int = 2, size: int = 4, tokens: int = 0,
    max_lost: float = 0.02, **settings: Any,
) -> Batches:  # fmt: skip
    draws = Draws(mixed, 11, **settings)
    cut = ByTokens(Packs(draws, tokens), size) if tokens else BySamples(draws, size, micro)
    return Batches(Steps(cut, world), Reader(mixed, 11, max_lost, rank), rank, pin_memory=False)


def batches(shards: Shards, rank: int = 0, world: int = 1, micro: int = 2, dropout: float = 0.0) -> Batches:
    return reader_of(Mixture([source_of(shards)]), rank, world, micro, caption_dropout=dropout)


def source_of(shards: Shards) -> Any:
    from hdl.data.mixture import Source

    return Source("data", shards)


def test_ranks_and_micro_batches_share_out_one_global_batch(shards: Shards) -> None:
    for step in range(4):
        whole = batches(shards, micro=4).of_step(step)[0]
        parts = [b for rank in (0, 1) for b in batches(shards, rank, world=2, micro=1).of_step(step)]
        assert len(parts) == 4
        parts.sort(key=lambda b: b.places)  # whichever rank has taken them
        assert [key for b in parts for key in b.keys] == whole.keys
        assert [place for b in parts for place in b.places] == whole.places == [0, 1, 2, 3]
        assert torch.equal(torch.cat([b.patches for b in parts]), whole.patches)
        assert torch.equal(torch.cat([b.text for b in parts]), whole.text)
        assert {b.global_patches for b in parts} == {len(whole.patches)}


def test_a_pack_holds_its_samples_one_after_another(shards: Shards) -> None:
    batch = batches(shards, micro=4).of_step(2)[0]
    by_key = {info.key: i for i, info in enumerate(shards.infos)}
    samples = [shards.read(by_key[key]) for key in batch.keys]
    texts = batch.text.split([s.text for s in batch.layout.segments])
    patches = batch.patches.split(batch.patch_counts)
    for sample, segment, text, patch in zip(samples, batch.layout.segments, texts, patches):
        assert (segment.rows, segment.cols) == (sample.rows, sample.cols)
        assert torch.equal(text, sample.text_embeds) and torch.equal(patch, sample.patches)


def test_reading_ahead_changes_nothing(shards: Shards) -> None:
    def contents(batch: Batch) -> tuple[list[str], torch.Tensor]:
        return batch.keys, batch.patches

    reader = batches(shards)
    in_order = [contents(reader.of_step(step)[0]) for step in range(5)]
    jumped = [contents(batches(shards).of_step(step)[0]) for step in (4, 2, 0)]
    for (keys, patches), (other_keys, other_patches) in zip([in_order[4], in_order[2], in_order[0]], jumped):
        assert keys == other_keys and torch.equal(patches, other_patches)
    reader.close()


def test_caption_dropout_puts_the_empty_prompt_in_place_of_its_share(shards: Shards) -> None:
    empty = shards.empty.text_embeds
    reader, dropped = batches(shards, micro=1, dropout=0.3), 0
    for step in range(100):
        for batch in reader.of_step(step):
            segment = batch.layout.segments[0]
            if segment.text == len(empty) and torch.equal(batch.text, empty):
                dropped += 1
    reader.close()
    assert 80 < dropped < 160  # 120 of 400 expected, deviation 9
    everything = batches(shards, micro=4, dropout=1.0).of_step(0)[0]
    assert torch.equal(everything.text, empty.repeat(4, 1))


def everything(reader: Batches, steps: int) -> dict[str, torch.Tensor]:
    """Of all that was read: pixels by key."""
    seen: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for batch in reader.of_step(step):
            seen |= dict(zip(batch.keys, batch.patches.split(batch.patch_counts)))
    reader.close()
    return seen


def test_mirroring_is_that_of_the_picture() -> None:
    image = torch.randint(0, 256, (3 * 32, 2 * 32, 3), dtype=torch.uint8)
    assert torch.equal(mirrored(patchify(image), 3, 2), patchify(image.flip(1)))


def test_half_of_those_that_may_be_are_mirrored() -> None:
    infos = [info(i, rows=2, cols=3, mirrored=i < 8) for i in range(16)]
    mixed = mixture(infos)
    plain = {i.key: mixed.read(n, 0).patches for n, i in enumerate(infos)}
    flips = {key: 0 for key in plain}
    reader = reader_of(mixed, micro=4, size=16, mirror=True)
    for step in range(60):
        for batch in reader.of_step(step):
            for key, pixels in zip(batch.keys, batch.patches.split(batch.patch_counts)):
                if not torch.equal(pixels, plain[key]):
                    assert torch.equal(pixels, mirrored(plain[key], 2, 3))
                    flips[key] += 1
    reader.close()
    assert all(flips[i.key] == 0 for i in infos[8:])
    assert all(12 < flips[i.key] < 48 for i in infos[:8])  # 30 expected, deviation 4
    assert all(torch.equal(pixels, plain[key]) for key, pixels in everything(reader_of(mixed), 8).items())


def test_captions_take_turns() -> None:
    infos = [info(i, text_tokens=[3, 4, 5], captions=["a", "b", "c"]) for i in range(8)]
    reader, used = reader_of(mixture(infos), micro=1, size=8), dict[str, list[int]]()
    for step in range(6):  # epochs
        for batch in reader.of_step(step):
            used.setdefault(batch.keys[0], []).append(batch.layout.segments[0].text)
    reader.close()
    assert all(sorted(texts[:3]) == [3, 4, 5] and texts[3:] == texts[:3] for texts in used.values())
    assert len({texts[0] for texts in used.values()}) > 1


def test_loss_weights_are_those_of_the_samples_sources() -> None:
    mixed = Mixture(
        [source("a", [info(i) for i in range(4)]), source("b", [info(9)], regularization=True)],
        regularization_weight=0.25,
    )
    reader = reader_of(mixed, size=5, micro=5)
    [batch] = reader.of_step(0)
    reader.close()
    assert {key: weight for key, weight in zip(batch.keys, batch.weights)} == {
        "s0": 1.0, "s1": 1.0, "s2": 1.0, "s3": 1.0, "s9": 0.25,
    }  # fmt: skip


def lossy(lost: set[str], **settings: Any) -> tuple[Batches, FakeShards]:
    """60 samples of two sizes in shards of ten."""
    infos = [info(i, rows=1 + i % 2, shard=f"shard-{i // 10}", text_tokens=[4 + i % 3]) for i in range(60)]
    mixed = mixture(infos)
    shards: Any = mixed.sources[0].shards
    shards.lost = lost
    return reader_of(mixed, size=12, micro=3, **settings), shards


def test_a_lost_shards_samples_are_replaced_by_others_of_their_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader, _ = lossy({"shard-2"}, max_lost=0.2)
    whole, _ = lossy(set())
    replaced = []
    for step in range(10):
        for batch, was in zip(reader.of_step(step), whole.of_step(step)):
            assert batch.patch_counts == was.patch_counts and batch.global_patches == was.global_patches
            for place, (key, before) in enumerate(zip(batch.keys, was.keys)):
                number = int(key[1:])
                assert number // 10 != 2
                if key != before:
                    assert int(before[1:]) // 10 == 2
                    assert batch.layout.segments[place].text <= was.layout.segments[place].text
                    replaced.append(number)
    assert len(replaced) == 20 and len(set(replaced)) > 8  # not always the same one
    assert list(reader.reader.lost) == ["somewhere: shard-2"]
    assert capsys.readouterr().out.count("shard shard-2 is lost, with 16.7% of the samples in all") == 1
    reader.close()
    whole.close()


def test_too_much_lost_stops_the_run_and_names_it() -> None:
    reader, _ = lossy({"shard-1", "shard-4"}, max_lost=0.2)
    with pytest.raises(
        HdlError, match=r"2 shard\(s\) lost, 33\.3% of the samples, .* 20\.0%: shard-. is gone; sh"
    ):
        everything(reader, 10)
    reader.close()


def test_nothing_of_the_same_size_left_stops_the_run() -> None:
    mixed = mixture([info(0, rows=7, shard="x"), *several(9)])
    mixed.sources[0].shards.lost = {"x"}  # type: ignore[attr-defined]
    reader = reader_of(mixed, max_lost=0.5)
    with pytest.raises(HdlError, match=r"x is gone. No other sample of 7 x 1 patches is left"):
        everything(reader, 10)
    reader.close()


def test_the_shards_wanted_next_are_asked_for() -> None:
    infos = [info(i, shard=f"shard-{i // 10:02d}") for i in range(2000)]
    reader = reader_of(mixture(infos), window=4)
    reader.of_step(0)
    shards: Any = reader.mixture.sources[0].shards
    asked = list(shards.prefetched)
    read = [
        info.shard
        for step in range(20)
        for info in (infos[int(k[1:])] for b in reader.of_step(step) for k in b.keys)
    ]
    reader.close()
    assert set(read) < set(asked) and asked[0] == read[0] and len(asked) < 200


def test_packs_are_read_whole() -> None:
    infos = [info(i, rows=1 + i % 4, text_tokens=[3 + i % 5]) for i in range(50)]
    reader = reader_of(mixture(infos), size=2, tokens=24)
    for step in range(12):
        plan = reader.steps.plan(step)
        parts = reader.of_step(step)
        assert [b.layout.tokens for b in parts] == [int(p.tokens.sum()) for p in plan.packs]
        for part in parts:  # what a place's noise level is shifted by is its own sample's size
            assert [plan.patches_of_each[place] for place in part.places] == list(part.patch_counts)
        assert {b.global_patches for b in parts} == {sum(len(b.patches) for b in parts)}
    assert reader.tally.draws == sum(reader.steps.plan(s).samples for s in range(12))
    reader.close()


def test_some_steps_are_read_ahead_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps of this size only so many as AHEAD_BYTES allows; the reading itself is not waited for."""
    mixed = mixture([info(i, rows=4, cols=4) for i in range(40)])
    read: list[int] = []

    def slow(i: int, caption: int, really: Any = mixed.read) -> Any:
        time.sleep(0.02)
        read.append(i)
        return really(i, caption)

    monkeypatch.setattr(mixed, "read", slow)
    monkeypatch.setattr(module, "AHEAD_BYTES", 3 * 2 * 16 * 3072)  # three steps, nearly
    reader = reader_of(mixed, size=2)
    waits = []
    for step in range(12):
        reader.of_step(step)
        waits.append(reader.waited)
        time.sleep(0.15)
        assert len(read) <= 2 * (step + 1 + 3)
    reader.close()
    assert waits[0] > 0.03 and np.median(waits[2:]) < 0.01
