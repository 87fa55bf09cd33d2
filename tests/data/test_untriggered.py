"""Draws that are kept, and what they are asked for with."""

from pathlib import Path

import numpy as np
import pytest

from hdl.data.batches import Batches, Keeping
from hdl.data.mixture import Mixture, Source
from hdl.data.picks import Draws
from hdl.data.prepare import Options, prepare
from hdl.data.reading import Reader
from hdl.data.samples import NO_CAPTION
from hdl.data.shards import Shards
from hdl.data.steps import BySamples, Steps
from hdl.data.untriggered import Untriggered, check_phrase, read_prompts
from hdl.errors import HdlError
from hdl.mini.style_set import write_style_set
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder

BASE = Path(__file__).parents[2] / "hdl" / "mini" / "o1-mini"
TRIGGER = "kotonia style"


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(open_checkpoint(BASE))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("styled")
    write_style_set(folder / "images", 6, 6)
    prepare(folder / "images", folder / "shards", BASE, options=Options(area=128))
    shards = Shards(folder / "shards")
    return Mixture([Source("taught", shards), Source("general", shards, regularization=True)])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("kotonia style, a big house", "a big house"),
        ("Kotonia Style. A big house", "A big house"),
        ("a house, kotonia style, at night", "a house, at night"),
        ("a house in kotonia style", "a house in"),
        ("kotonia styles are many", "kotonia styles are many"),
        ("kotonia style", UNCONDITIONAL_PROMPT),
        ("a plain house", "a plain house"),
    ],
)
def test_a_caption_without_its_trigger(encoder: PromptEncoder, caption: str, expected: str) -> None:
    assert Untriggered(encoder, [TRIGGER], 0).without(caption) == expected


def test_every_phrase_is_taken_out(encoder: PromptEncoder) -> None:
    both = Untriggered(encoder, [TRIGGER, "zeffa tag"], 0)
    assert both.without("kotonia style, zeffa tag, a big house") == "a big house"
    assert both.without("a big house, Zeffa tag, at night") == "a big house, at night"
    assert Untriggered(encoder, [TRIGGER], 0).without("kotonia style, zeffa tag, x") == "zeffa tag, x"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_the_share_of_kept_draws_is_exact_and_even(mixture: Mixture, share: float) -> None:
    kept = Draws(mixture, 3, kept_share=share).take(0, 0, 400).kept
    assert kept.sum() == round(400 * share)
    steps = kept.reshape(-1, 20).sum(axis=1)
    assert steps.max() - steps.min() <= 1
    again = Draws(mixture, 3, kept_share=share)
    pieces = [again.take(0, start, start + 7).kept for start in range(0, 399, 7)]
    assert np.array_equal(np.concatenate(pieces), kept[:399])


def test_regularization_draws_are_kept_if_asked_for(mixture: Mixture) -> None:
    draws = Draws(mixture, 3, kept_share=0.25, keep_regularization=True).take(0, 0, 96)
    general = mixture.regularization[draws.sample]
    assert draws.kept[general].all()
    assert 0.1 < draws.kept[~general].mean() < 0.4
    assert not Draws(mixture, 3, keep_regularization=False).take(0, 0, 96).kept.any()


def batches_of(mixture: Mixture, keeping: Keeping | None, share: float, world: int = 1, micro: int = 4):  # type: ignore[no-untyped-def]
    draws = Draws(mixture, 3, kept_share=share)
    reader = Reader(mixture, 3, 0.0)
    return [
        Batches(
            Steps(BySamples(draws, 8, micro), world), reader, rank, pin_memory=False, keeping=keeping
        ).of_step(0)
        for rank in range(world)
    ]


def test_kept_draws_are_asked_for_without_the_trigger(mixture: Mixture, encoder: PromptEncoder) -> None:
    keeping = Keeping(Untriggered(encoder, [TRIGGER], 3), weight=0.5, together=False)
    (batches,), (plain,) = batches_of(mixture, keeping, 0.25), batches_of(mixture, None, 0.25)
    picks = Draws(mixture, 3, kept_share=0.25).take(0, 0, 8)
    start = 0
    for batch, usual in zip(batches, plain):
        assert usual.kept == () and usual.base is None
        assert batch.kept == tuple(picks.kept[start : start + 4].tolist()) and sum(batch.kept) == 1
        assert batch.patches.equal(usual.patches)  # the same pictures
        texts = batch.text.split([s.text for s in batch.layout.segments])
        usual_texts = usual.text.split([s.text for s in usual.layout.segments])
        for i, kept in enumerate(batch.kept):
            info = mixture.info(int(picks.sample[start + i]))
            caption = info.captions[int(picks.caption[start + i])]
            wanted = encoder.embed(encoder.ids(caption.removeprefix(f"{TRIGGER}, ")))
            assert texts[i].equal(wanted if kept else usual_texts[i])
            assert batch.weights[i] == usual.weights[i] * (0.5 if kept else 1.0)
        assert batch.base and batch.base.places == [batch.places[batch.kept.index(True)]]
        at = batch.kept.index(True)
        assert batch.base.text.equal(texts[at])
        assert batch.base.patches.equal(batch.patches.split(batch.patch_counts)[at])
        start += 4


def test_ranks_that_pass_together_ask_the_base_together(mixture: Mixture, encoder: PromptEncoder) -> None:
    for together in (False, True):
        keeping = Keeping(Untriggered(encoder, [TRIGGER], 3), weight=1.0, together=together)
        ranks = batches_of(mixture, keeping, 0.125, world=2)  # one of the step's eight draws
        assert sorted(sum(batch.kept) for (batch,) in ranks) == [0, 1]
        assert sorted(batch.base is not None for (batch,) in ranks) == [together, True]


def test_prompts_of_a_list_take_turns_where_they_fit(mixture: Mixture, encoder: PromptEncoder) -> None:
    prompts = ["a small red ball", "a big blue fish at the sea", "words " * 60]
    untriggered = Untriggered(encoder, [TRIGGER], 3, prompts)
    sample = mixture.read(0, 0)
    said = [untriggered.reword(sample, number, room=40).caption for number in range(200)]
    assert set(said) == set(prompts[:2])
    anywhere = {untriggered.reword(sample, number, room=None).caption for number in range(200)}
    assert anywhere == set(prompts)
    assert untriggered.longest_prompt == len(encoder.ids(prompts[2])) > 40 > untriggered.shortest_prompt
    assert untriggered.reword(sample, 5, room=2).caption == untriggered.without(sample.caption)
    (reworded,) = {untriggered.reword(sample, 5, room=40).caption for _ in range(3)}
    assert encoder.ids(reworded) == untriggered.reword(sample, 5, room=40).input_ids.tolist()
    dropped = untriggered.reword(mixture.read(0, NO_CAPTION), 5, room=2)
    assert dropped.caption == ""


def test_what_cannot_be_asked_with_is_told_beforehand(
    mixture: Mixture, encoder: PromptEncoder, tmp_path: Path
) -> None:
    check_phrase(mixture, "data.trigger", "Kotonia style")
    with pytest.raises(HdlError, match="'kotonia stile' is in no caption"):
        check_phrase(mixture, "data.trigger", "kotonia stile")
    with pytest.raises(HdlError, match="holds the trigger"):
        Untriggered(encoder, [TRIGGER], 0, ["a house in kotonia style"])
    with pytest.raises(HdlError, match="not readable"):
        read_prompts(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(HdlError, match="no prompt there"):
        read_prompts(tmp_path / "empty.txt")
