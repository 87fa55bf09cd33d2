"""How often each sample is drawn: as the counts say, in every epoch, however they come out."""

import re
from pathlib import Path

import numpy as np
import pytest

from hdl.config import Data, Source, load_run, save_run
from hdl.data import mixture as module
from hdl.data.mixture import Mixture, open_mixture
from hdl.data.order import Stream
from hdl.data.quotas import Quotas
from hdl.data.tally import Tally
from hdl.errors import HdlError
from tests.data.fakes import info, mixture, several, source


def test_whole_counts_are_drawn_exactly_and_others_on_average() -> None:
    counts = np.array([1, 2, 0, 0.3, 1.25, 0.3, 0.3, 2.85])
    quotas = Quotas(counts)
    assert quotas.length == 8
    epochs = np.stack([quotas.times(7, epoch) for epoch in range(4000)])
    assert (epochs.sum(axis=1) == 8).all()
    assert ((epochs == np.floor(counts)) | (epochs == np.ceil(counts))).all()
    assert np.abs(epochs.mean(axis=0) - counts).max() < 4 * 0.5 / 4000**0.5


def test_an_epoch_has_one_draw_at_least_and_a_whole_number() -> None:
    assert Quotas(np.array([0.1, 0.2])).length == 1
    for counts in ([1, 1, 0.3], [0.9, 0.9], [0.9, 0.7, 0.9], [0.5, 0.999], [0.1] * 7, [3, 0.2]):
        quotas = Quotas(np.array(counts))
        epochs = np.stack([quotas.times(1, epoch) for epoch in range(200)])
        assert (epochs.sum(axis=1) == max(1, round(sum(counts)))).all()
        assert (epochs <= np.ceil(counts)).all() and (epochs >= np.floor(counts)).all()
        assert quotas.expected.sum() == pytest.approx(quotas.length)
        assert np.abs(epochs.mean(axis=0) - quotas.expected).max() < 0.12


def test_a_group_and_a_kind_in_it_get_their_sum_in_every_epoch() -> None:
    counts = np.repeat([0.3, 0.5, 0.3], [100, 40, 60])
    quotas = Quotas(counts, np.repeat([0, 0, 1], [100, 40, 60]))
    for epoch in range(50):
        times = quotas.times(3, epoch)
        assert [int(part.sum()) for part in np.split(times, [100, 140])] == [30, 20, 18]


def drawn_of(mixed: Mixture, epochs: int) -> np.ndarray:
    return Stream(mixed.quotas, 5).draws(0, 0, epochs * mixed.quotas.length).sample


def test_what_is_drawn_is_what_was_asked_for() -> None:
    """Sources, tags and styles; shares in the end match the request: the whole ones exactly."""
    anime = [info(i, style="anime", tags=["nsfw"] if i < 20 else []) for i in range(60)]
    plain = [info(i, tags=["nsfw", "anime"] if i == 100 else []) for i in range(100, 140)]
    mixed = Mixture(
        [source("styled", anime), source("plain", plain, repeats=3, tags={"nsfw": 0.5})],
        tags={"nsfw": 0.3, "anime": 2.0},
    )
    expected = mixed.quotas.expected
    assert expected[0] == pytest.approx(0.6, rel=0.02) and expected[30] == 2 and expected[61] == 3
    assert expected[60] == pytest.approx(3 * 2 * 0.3 * 0.5, rel=0.2)  # both its tags, the source's own too
    assert mixed.quotas.length == round(20 * 0.6 + 40 * 2 + 39 * 3 + 0.9)
    tally = Tally(mixed)
    drawn = drawn_of(mixed, 50)
    tally.add(drawn)
    assert (np.bincount(drawn, minlength=100)[61:] == 50 * 3).all()
    asked = {name: expected[part].sum() / mixed.quotas.length for name, part in mixed.parts().items()}
    assert asked.keys() == {"styled", "plain", "nsfw", "anime"}
    for name, share in tally.shares().items():
        assert share == pytest.approx(asked[name], abs=1 / mixed.quotas.length)
    lines = mixed.describe().splitlines()
    assert lines[0] == "mixture: an epoch is 210 draws of 100 samples"
    assert re.fullmatch(r"  nsfw: 21 samples, 6\.\d\d% of the draws", lines[4]), lines
    assert "nsfw 6." in tally.describe()


def test_whole_numbers_are_drawn_to_the_number() -> None:
    mixed = Mixture([source("a", several(7), repeats=2), source("b", several(5))], tags={})
    tally = Tally(mixed)
    tally.add(drawn_of(mixed, 10))
    assert tally.shares() == {"a": 14 / 19, "b": 5 / 19} and tally.draws == 190


def test_weights_share_the_draws_out() -> None:
    mixed = Mixture(
        [
            source("few", several(10), weight=3.0),
            source("many", several(300), weight=1.0, regularization=True),
        ],
        regularization_weight=0.5,
    )
    assert mixed.quotas.length == 310
    drawn = drawn_of(mixed, 100)
    assert np.isclose((drawn < 10).mean(), 0.75, atol=1e-3)
    assert set(mixed.loss_weight[:10]) == {1.0} and set(mixed.loss_weight[10:]) == {0.5}
    assert "many: 300 samples, 25.00% of the draws (regularization)" in mixed.describe()


def test_a_multiplier_of_nothing_leaves_samples_out() -> None:
    mixed = mixture([*several(5), info(5, tags=["nsfw"])], tags={"nsfw": 0.0})
    assert 5 not in drawn_of(mixed, 20) and mixed.quotas.length == 5


def test_images_are_held_out_by_their_hash_with_all_their_views() -> None:
    infos = [info(i // 2, view=str(i % 2)) for i in range(2000)]
    mixed = Mixture(
        [source("a", infos), source("again", infos[:100]), source("reg", infos[:100], regularization=True)],
        held_out=0.1,
    )
    held = set(mixed.held_out.tolist())
    assert 150 < len([i for i in held if i < 2000]) < 250
    assert all((i in held) == (i + 1 in held) for i in range(0, 2000, 2))
    assert all((i in held) == (2000 + i in held) for i in range(100))
    assert not any(i >= 2100 for i in held)
    assert not held & set(drawn_of(mixed, 2).tolist())
    more = Mixture([source("a", infos)], held_out=0.2)
    assert {i for i in held if i < 2000} < set(
        more.held_out.tolist()
    )  # a larger share keeps what a smaller one did
    assert f"; {len(held)} more are held out" in mixed.describe()
    unused = Mixture([source("a", infos), source("b", infos, repeats=0.0)], held_out=0.1)
    assert unused.held_out.max() < 2000  # what is left out anyway says nothing of what is learnt
    unweighted = Mixture([source("a", infos, weight=1.0), source("b", infos, weight=0.0)], held_out=0.1)
    assert unweighted.held_out.tolist() == unused.held_out.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture([info(0, tags=["b"], style="a")], tags={"nsfw": 2.0}), "data.tags: .*'nsfw'; known are: a, b"),
        (
            lambda: Mixture([source("x", several(1)), source("y", [info(1, tags=["t"])]), source("z", several(1), tags={"t": 2.0})]),
            "data.sources.z.tags: no sample has the tag or style 't'; known are: t",
        ),
        (lambda: mixture([]), "nothing to train on: somewhere has no samples"),
        (lambda: mixture(several(3), held_out=0.9999999), "all 3 samples are held out; lower data.held_out"),
        (lambda: mixture(several(3), held_out=1e-9), "data.held_out 1e-09: of 3 images none is in that share"),
        (lambda: mixture([info(0, tags=["t"])], tags={"t": 0.0}), "leave none of the 1 samples"),
        (
            lambda: Mixture([source("x", several(1), weight=1.0), source("y", several(1), weight=1.0, repeats=0.0)]),
            "data.sources.y: its weight asks for draws, but none",
        ),
        (lambda: Mixture([source("x", several(1), weight=0.0)]), "every weight is 0"),
        (
            lambda: mixture([info(0, references=[(1, 1)]), info(1)]),
            "somewhere: 1 of its samples are paired with reference images",
        ),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_be(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HdlError, match=message):
        make()


def test_sources_are_opened_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(location, fingerprint, elsewhere):  # type: ignore[no-untyped-def]
        assert fingerprint == "f" and (elsewhere.folder, elsewhere.gib) == (Path("cached"), 3)
        assert elsewhere.storage == {"anon": True}
        if location == "s3://b/other":
            raise HdlError("shards of another base")
        return source("", several(4)).shards

    monkeypatch.setattr(module, "Shards", opened)
    where = {"cache": Path("cached"), "cache_gib": 3.0, "storage": {"anon": True}}
    assert open_mixture(Data(shards="s", **where), "f").quotas.length == 4
    two = {"one": Source(shards="s", repeats=2), "two": Source(shards="s://t", weight=None)}
    assert open_mixture(Data(sources=two, **where), "f").quotas.length == 12
    two["two"] = Source(shards="s3://b/other")
    with pytest.raises(HdlError, match=r"data\.sources\.two: shards of another base"):
        open_mixture(Data(sources=two, **where), "f")


CONFIG = """
[model]
base = "b"
[save]
output = "o"
[data]
tags = { nsfw = 0.3, anime = "2x" }
[data.sources.one]
shards = "s3://bucket/one"
weight = 1
tags = { other = 0 }
[data.sources.two]
shards = "two"
weight = 3
regularization = true
"""


def test_a_config_describes_the_sources(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    run = load_run([str(tmp_path / "run.toml"), "--data.tags", "nsfw=0.5"])
    assert run.data.tags == {"nsfw": 0.5, "anime": 2.0}
    assert run.data.all_sources()["one"] == Source(shards="s3://bucket/one", weight=1, tags={"other": 0})
    save_run(run, tmp_path / "saved.toml")
    assert load_run([str(tmp_path / "saved.toml")]) == run
    short = load_run(["--model.base", "b", "--save.output", "o", "--data.shards", "s"])
    assert list(short.data.all_sources().values()) == [Source(shards="s")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.shards", "s"], r"data: expected either shards or sources.NAME.shards, both are given"),
        (["--data.tags", "nsfw=twice"], r"data.tags.nsfw: .*valid number.*found 'twice'"),
        (["--data.tags", "nsfw=-1"], r"data.tags.nsfw: .*greater than or equal to 0"),
        (["--data.held_out", "1"], r"data.held_out: .*less than 1"),
        (["--data.sources", '{"three": {"shards": "s"}}'], r"data: sources.three has no weight, others have"),
        (["--train.batch_packs", "2"], r"train: batch_packs needs micro_batch_tokens beside it"),
        (["--train.micro_batch_tokens", "2"], r"train: micro_batch_tokens needs batch_packs beside it"),
        (
            ["--train.micro_batch_tokens", "2", "--train.batch_packs", "2", "--train.micro_batch_size", "1"],
            r"micro_batch_size counts samples and micro_batch_tokens tokens; give one",
        ),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    with pytest.raises(HdlError, match=message):
        load_run([str(tmp_path / "run.toml"), *flags])


def test_data_have_to_be_given() -> None:
    with pytest.raises(HdlError, match=r"^data.shards \(or several data.sources.NAME.shards\) is required$"):
        load_run(["--model.base", "b", "--save.output", "o"])
