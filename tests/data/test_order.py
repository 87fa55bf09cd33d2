"""The stream: every draw of an epoch once, for any number of lanes, and shard by shard where asked for."""

import numpy as np
import pytest

from hdl.data.order import Stream, samples_of_step
from hdl.data.quotas import Quotas


@pytest.mark.parametrize("lanes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 12, 40])
def test_lanes_take_every_draw_of_every_epoch_once(length: int, lanes: int) -> None:
    stream, epochs = Stream(Quotas(np.ones(length)), 3, lanes=lanes), 2 * lanes + 1
    parts = [stream.draws(lane, 0, epochs * length // lanes + 1) for lane in range(lanes)]
    assert len(np.unique(np.concatenate([part.number for part in parts]))) == sum(
        len(p.number) for p in parts
    )
    taken = [[(e * length + lane) // lanes for e in range(epochs + 1)] for lane in range(lanes)]
    for e in range(epochs):
        drawn = [part.sample[t[e] : t[e + 1]] for part, t in zip(parts, taken)]
        assert sorted(np.concatenate(drawn).tolist()) == list(range(length))
        assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
        so_far = [t[e + 1] for t in taken]
        assert max(so_far) - min(so_far) <= 1
        for part, t in zip(parts, taken):
            assert (part.turn[t[e] : t[e + 1]] == e).all()  # each once an epoch


def test_a_place_is_a_function_of_its_number_alone() -> None:
    def stream() -> Stream:
        return Stream(
            Quotas(np.array([1, 0.5, 2, 3, 0.5, 1])), 9, shard=np.array([0, 0, 1, 1, 2, 2]), window=1, lanes=2
        )

    one = stream()
    whole = one.draws(1, 0, 100)
    for start, stop in ((60, 90), (3, 4), (0, 50)):
        part = stream().draws(1, start, stop)
        assert np.array_equal(part.sample, whole.sample[start:stop])
        assert np.array_equal(part.turn, whole.turn[start:stop])
        assert np.array_equal(part.number, whole.number[start:stop])
    assert np.array_equal(
        one.draws(1, 10, 20).sample, whole.sample[10:20]
    )  # epochs before those it remembers


def test_turns_count_a_samples_draws() -> None:
    counts = np.array([1, 3, 0.5, 2.5])
    drawn = Stream(Quotas(counts), 1).draws(0, 0, 7 * 200)
    for sample, count in enumerate(counts):
        turns = np.sort(drawn.turn[drawn.sample == sample])
        if count == int(count):
            assert turns.tolist() == list(range(len(turns)))
        else:  # any number of captions is gone through evenly
            for captions in (2, 3):
                shares = np.bincount(turns % captions, minlength=captions) / len(turns)
                assert np.abs(shares - 1 / captions).max() < 0.1, (count, captions)


def test_a_window_mixes_some_shards_at_a_time() -> None:
    shards, each, window = 12, 30, 3
    shard = np.repeat(np.arange(shards), each)
    stream = Stream(Quotas(np.ones(len(shard))), 2, shard=shard, window=window)
    orders = []
    for epoch in range(2):
        drawn = shard[stream.draws(0, epoch * 360, (epoch + 1) * 360).sample]
        windows = [tuple(sorted(set(part.tolist()))) for part in np.split(drawn, shards // window)]
        assert all(len(w) == window for w in windows) and len({s for w in windows for s in w}) == shards
        assert len(set(drawn[:10].tolist())) == window  # mixed inside
        orders.append(windows)
    assert orders[0] != orders[1]


def test_lanes_read_their_own_shards() -> None:
    shard = np.repeat(np.arange(16), 25)
    stream = Stream(Quotas(np.ones(400)), 4, shard=shard, window=2, lanes=4)
    read = [set(shard[stream.draws(lane, 0, 100).sample].tolist()) for lane in range(4)]
    assert all(len(r) == 4 for r in read) and len(set.union(*read)) == 16


def test_one_lane_is_the_order_it_always_was() -> None:
    stream = [i for step in range(30) for i in samples_of_step(10, 4, seed=3, step=step)]
    epochs = [stream[start : start + 10] for start in range(0, 120, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert samples_of_step(10, 4, 3, 7) == samples_of_step(10, 4, 3, 7) != samples_of_step(10, 4, 4, 7)
    assert sorted(samples_of_step(3, 6, seed=0, step=5)) == [0, 0, 1, 1, 2, 2]  # more than there are


def test_a_million_samples_are_ordered_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange = Stream._arranged
    n = 1_000_000
    shard = np.arange(n) // 300
    counts = np.where(np.arange(n) % 3, 1.0, 0.3)
    stream = Stream(Quotas(counts, np.zeros(n, dtype=np.int32)), 0, shard=shard, window=8, lanes=4)
    arranged = []
    monkeypatch.setattr(
        Stream, "_arranged", lambda self, epoch: arranged.append(epoch) or arrange(self, epoch)
    )
    drawn = [stream.draws(lane, start, start + 100) for lane in range(4) for start in (0, 100)]
    assert all(len(draws.sample) == 100 for draws in drawn)
    assert arranged == [0]  # takes a second or so
