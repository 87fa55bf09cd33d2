"""Which samples a step trains on, and how they are packed."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from hdl.data.batches import Batch, Batches, samples_of_step
from hdl.data.prepare import Options, prepare
from hdl.data.shards import Shards
from tests.data.image_folders import noise, put


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    for i, (width, height) in enumerate([(64, 64), (96, 32), (32, 96), (64, 64), (64, 32)]):
        put(images, f"{i}.png", f"picture number {i} " + "more words " * i, noise(width, height, seed=i))
    prepare(images, out, Path(__file__).parents[1] / "golden" / "o1-tiny", options=Options(area=64))
    return Shards(out)


def batches(shards: Shards, rank: int = 0, world: int = 1, micro: int = 2, dropout: float = 0.0) -> Batches:
    return Batches(
        shards,
        batch_size=4,
        micro_batch_size=micro,
        rank=rank,
        world=world,
        seed=11,
        caption_dropout=dropout,
        pin_memory=False,
    )


def test_every_epoch_is_every_sample_once_in_another_order() -> None:
    stream = [i for step in range(30) for i in samples_of_step(10, 4, seed=3, step=step)]
    epochs = [stream[start : start + 10] for start in range(0, 120, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert samples_of_step(10, 4, 3, 7) == samples_of_step(10, 4, 3, 7) != samples_of_step(10, 4, 4, 7)


def test_a_batch_larger_than_the_data_takes_samples_again() -> None:
    assert Counter(samples_of_step(3, 6, seed=0, step=5)) == {0: 2, 1: 2, 2: 2}


def test_ranks_and_micro_batches_share_out_one_global_batch(shards: Shards) -> None:
    for step in range(4):
        whole = batches(shards, micro=4).of_step(step)[0]
        parts = [b for rank in (0, 1) for b in batches(shards, rank, world=2, micro=1).of_step(step)]
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
