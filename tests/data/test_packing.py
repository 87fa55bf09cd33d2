"""Packs by tokens: full, of every draw once, the same from wherever they are counted and for any number of ranks."""

import numpy as np
import pytest

from hdl.bench.cases import RATIOS
from hdl.data.buckets import choose_bucket
from hdl.data.packing import WINDOW, Packs, packed
from hdl.data.picks import NO_CAPTION, Draws
from hdl.data.samples import SampleInfo
from hdl.data.steps import BySamples, ByTokens, Steps
from hdl.errors import HdlError
from tests.data.fakes import info, mixture, several


def stream_of(sides: tuple[int, ...], count: int, captions: tuple[int, int] = (20, 400)) -> list[SampleInfo]:
    """Images of about these squares' areas in the benchmark's aspect ratios, with captions of so many tokens."""
    rng = np.random.default_rng(0)
    grids = [choose_bucket(w * side, h * side, side, True) for side in sides for w, h in RATIOS]
    chosen = rng.integers(len(grids), size=count).tolist()
    texts = rng.integers(captions[0], captions[1] + 1, count).tolist()
    return [
        info(i, rows=grids[g][0], cols=grids[g][1], text_tokens=[text], shard=f"shard-{i // 100}")
        for i, (g, text) in enumerate(zip(chosen, texts))
    ]


MIXED = stream_of((1024,), 3000)
BUDGET = 4736


def draws(infos: list[SampleInfo] = MIXED, seed: int = 1, **settings: object) -> Draws:
    return Draws(mixture(infos), seed, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sides", "most"), [((1024,), 0.02), ((512,), 0.01), ((512, 1024, 1536), 0.03)])
def test_waste_on_mixed_streams(sides: tuple[int, ...], most: float) -> None:
    """The first is the stream of BENCH.md: twelve aspect ratios, captions of 20 to 400 tokens. The least that any
    packing of it can waste, however far it looks, is 1.6 %: at most four go in a pack."""
    taken = draws(stream_of(sides, 6000))
    sizes = [taken.take(0, w * WINDOW, (w + 1) * WINDOW).tokens for w in range(4)]
    packs = sum(len(packed(tokens, BUDGET)) for tokens in sizes)
    waste = 1 - sum(int(tokens.sum()) for tokens in sizes) / (packs * BUDGET)
    assert waste <= most, waste


@pytest.mark.parametrize(
    "tokens", [[5], [10] * 7, [1, 10, 10, 3], [1] * 23, [6, 5, 4, 3, 2, 1] * 5, [9, 1, 9, 1, 9, 2]]
)
def test_every_sample_is_in_one_pack(tokens: list[int]) -> None:
    packs = packed(np.array(tokens), 10)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in pack) <= 10 for pack in packs)
    assert len(packs) <= 1.3 * sum(tokens) / 10 + 1


def test_every_draw_is_packed_once_within_its_window() -> None:
    packs = Packs(draws(lanes=2), BUDGET)
    number, seen = 0, []
    while len(seen) < 2 * WINDOW:
        pack = packs.of(1, number)
        assert pack.tokens.sum() <= BUDGET and (np.diff(pack.number) > 0).all()
        seen += pack.number.tolist()
        number += 1
    places = np.array(seen) // 2  # of the lane
    assert sorted(places[:WINDOW].tolist()) == list(range(WINDOW))  # so none waits longer
    assert sorted(places.tolist()) == list(range(2 * WINDOW))


def test_packs_are_counted_from_anywhere_with_the_same_result() -> None:
    one = Packs(draws(), BUDGET)
    far = [one.of(0, number) for number in (1900, 1200, 3, 1901)]
    state = one.state(1901)
    assert state["windows"][0][0] > 0
    known = Packs(draws(), BUDGET, state)
    for number, pack in zip((1900, 1200, 3, 1901), far):
        for packs in (Packs(draws(), BUDGET), known):
            assert np.array_equal(packs.of(0, number).number, pack.number), number
    other = Packs(draws(), BUDGET + 100, state)  # counted for another budget: not taken
    assert np.array_equal(other.of(0, 1900).number, Packs(draws(), BUDGET + 100).of(0, 1900).number)


def test_lengths_are_those_of_the_captions_that_are_drawn() -> None:
    infos = [info(i, text_tokens=[5, 50, 500]) for i in range(40)]
    picks = draws(infos, caption_dropout=0.2).take(0, 0, 400)
    text = picks.tokens - picks.patches
    assert (text == np.where(picks.caption == NO_CAPTION, 3, np.array([5, 50, 500])[picks.caption])).all()


def test_a_sample_larger_than_a_pack_is_named() -> None:
    infos = [*several(3), info(7, rows=40, cols=40, text_tokens=[30, 90])]
    with pytest.raises(
        HdlError, match=r"micro_batch_tokens 1650: sample s7 \(of 7.png\) alone has 1690 tokens"
    ):
        Packs(draws(infos), 1650)
    Packs(draws(infos), 1690)


@pytest.mark.parametrize("lanes", [1, 2])
def test_ranks_deal_the_same_packs_out_evenly(lanes: int) -> None:
    plans = {}
    for world in (1, 2, 4):
        steps = Steps(ByTokens(Packs(draws(lanes=lanes), 3000), 8), world)
        plans[world] = [steps.plan(step) for step in range(40)]
        for plan in plans[world]:
            assert sorted(i for mine in plan.dealt for i in mine) == list(range(8))
            assert {len(mine) for mine in plan.dealt} == {8 // world}
            assert [p for pack in range(8) for p in plan.places(pack)] == list(range(plan.samples))
    dealt, in_order = 0, 0
    for plan, two in zip(plans[1], plans[2]):
        assert all(np.array_equal(a.number, b.number) for a, b in zip(plan.packs, two.packs))
        loads = [sum(int(two.packs[i].tokens.sum()) for i in mine) for mine in two.dealt]
        dealt += abs(loads[0] - loads[1])
        halves = [sum(int(p.tokens.sum()) for p in half) for half in (two.packs[:4], two.packs[4:])]
        in_order += abs(halves[0] - halves[1])
    assert dealt < 0.7 * in_order if lanes == 1 else dealt == in_order


def test_a_rank_reads_its_own_lanes_shards_and_says_which() -> None:
    infos = stream_of((64,), 24_000)
    taken = draws(infos, window=2, lanes=4)
    cuts = [BySamples(taken, 16, 2), ByTokens(Packs(draws(infos, window=2, lanes=4), 600), 8)]
    for cut, steps_read, most in zip(cuts, (40, 40), (20, 60)):
        steps = Steps(cut, 4)
        shards = taken.mixture.columns.shards
        for rank in range(4):
            read = {
                shards[s][1]
                for step in range(5, 5 + steps_read)
                for i in steps.plan(step).dealt[rank]
                for s in taken.mixture.columns.shard[steps.plan(step).packs[i].sample]
            }
            needed = steps.shards_needed(5, rank, 8)[0]
            assert read <= set(needed) and len(needed) <= most < len(shards)
        first = steps.plan(5).packs[steps.plan(5).dealt[0][0]].sample[0]
        assert shards[taken.mixture.columns.shard[first]][1] in steps.shards_needed(5, 0, 2)[0]


def test_lanes_that_do_not_divide_a_step() -> None:
    with pytest.raises(HdlError, match=r"train.batch_size 4 is not a multiple of data.lanes 3"):
        BySamples(draws(lanes=3), 4, 1)
    with pytest.raises(HdlError, match=r"train.batch_packs 4 is not a multiple of data.lanes 3"):
        ByTokens(Packs(draws(lanes=3), BUDGET), 4)
