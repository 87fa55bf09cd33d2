"""Pairs for editing, from files to what the model is given: token for token what it is given when it edits.

The golden `edit` cases hold that; the loss is held to one built by hand from the requests that pictures are drawn
from.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import Batch, pack
from hdl.data.mixture import Mixture, Source
from hdl.data.packing import Packs
from hdl.data.picks import Draws
from hdl.data.prepare import Options, prepare
from hdl.data.reading import Reader
from hdl.data.samples import NO_CAPTION, Sample
from hdl.data.shards import Shards
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS, noise_keys
from hdl.flow.step import flow_matching_loss, with_references
from hdl.kernels.noising import noise_patches
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.decoder import O1, References
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import to_model, unpatchify
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.o1.visual import Eyes, VisualTower
from hdl.sample.generate import Request
from hdl.sample.references import edit_request, read_reference
from tests.data.fakes import info, mixture
from tests.data.image_folders import BASE, noise, put

HEIGHT, WIDTH = 96, 64


@pytest.fixture(scope="module")
def tower() -> VisualTower:
    return VisualTower(open_checkpoint(BASE), "cpu", torch.float32)


@pytest.fixture(scope="module")
def model() -> O1:
    return load_model(open_checkpoint(BASE), "cpu", torch.float32)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(open_checkpoint(BASE))


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def folder(images: Path) -> Path:
    """One, two and no references; both of the pairs' captions twice."""
    put(images, "ball.png", "a red ball", noise(WIDTH, HEIGHT, 1))
    put(images, "one.png", "paint it red", noise(WIDTH, HEIGHT, 2))
    put(images, "one.ref.png", None, noise(70, 90, 3))
    put(images, "two.png", "the first in the second's style", noise(WIDTH, HEIGHT, 4))
    put(images, "two.ref1.png", None, noise(200, 96, 5))
    put(images, "two.ref2.png", None, noise(64, 64, 6))
    for name in ("one", "two"):
        (images / f"{name}.1.txt").write_text("do as before, but otherwise")
    return images


@pytest.fixture
def mixed(folder: Path, run: Callable[..., Any], tmp_path: Path) -> Mixture:
    run(options=Options(area=80))
    return Mixture([Source("data", Shards(tmp_path / "out"))])


def number_of(mixed: Mixture, source: str) -> int:
    return next(i for i in range(len(mixed.columns)) if mixed.info(i).source == source)


def batch_of(mixed: Mixture, tower: VisualTower, picked: list[tuple[str, int]]) -> Batch:
    samples = [mixed.read(number_of(mixed, source), caption) for source, caption in picked]
    patches = sum(len(sample.patches) for sample in samples)
    return pack(samples, list(range(len(samples))), patches, eyes=tower.eyes)


@pytest.mark.parametrize("name", ["edit1", "edit2"])
def test_a_pair_is_what_the_model_was_given_to_edit(
    golden: Path, name: str, tower: VisualTower, model: O1, tmp_path: Path
) -> None:
    cases = json.loads((golden / "index.json").read_text())["cases"]
    case = next(case for case in cases if case["file"] == f"{name}.safetensors")
    stored = load_file(golden / case["file"])
    put(tmp_path / "images", "a.png", case["prompt"], noise(case["width"], case["height"]))
    for i, file in enumerate(case["refs"], 1):
        shutil.copy(golden / file, tmp_path / "images" / f"a.ref{i}.png")
    prepare(tmp_path / "images", tmp_path / "out", BASE, options=Options(area=80))

    mixed = Mixture([Source("data", Shards(tmp_path / "out"))])
    sample = mixed.read(0, 0)
    assert (sample.rows * 32, sample.cols * 32) == (case["height"], case["width"])
    assert torch.equal(sample.input_ids, stored["input_ids"].flatten())
    assert mixed.info(0).text_tokens == [len(sample.input_ids)]
    batch = pack([sample], [0], len(sample.patches), eyes=tower.eyes)
    assert torch.equal(batch.layout.positions, stored["position_ids"].flatten(1))
    assert torch.equal(batch.layout.token_types(), stored["token_types"].flatten())
    assert batch.references is not None
    target = len(sample.patches)
    assert torch.allclose(to_model(batch.references), stored["z_init"][target:], atol=1e-6)

    text, shown = with_references(batch, tower)
    t = stored["timesteps"].flatten()[:1]
    x_pred = model(text, stored["z_init"][:target], t, batch.layout, **shown)
    error = (x_pred - stored["x_pred_first"]).norm() / stored["x_pred_first"].norm()
    assert x_pred.shape == stored["x_pred_first"].shape and error < 1e-4


def by_hand(model: O1, request: Request, pixels: Tensor, sigma: float, place: int, empty: bool) -> Tensor:
    """One sample's mean x0 error, from a request to draw it, in a run of its own."""
    shown = request.shown
    grids, seen, text, references = (), (), request.text, None
    if shown:
        grids, seen, references = shown.grids, shown.seen, References(shown.patches, shown.deepstack)
        if empty:
            text, seen = shown.empty_text, shown.empty_seen
    layout = lay_out([Segment(len(text), request.height // 32, request.width // 32, grids, seen)])
    levels = torch.tensor([sigma])
    z = noise_patches(
        pixels, levels, [len(pixels)], noise_keys([place], 7, 3),
        noise_scale=VARIANTS["full"].noise_scale, clip=None, dtype=torch.float32,
    )  # fmt: skip
    x_pred = model(text.float(), z, 1 - levels, layout, references=references)
    return (x_pred - (pixels.float() / 127.5 - 1)).square().mean()


def test_the_loss_of_pairs_and_others_in_one_batch_is_that_of_each_by_hand(
    mixed: Mixture, folder: Path, tower: VisualTower, model: O1, encoder: PromptEncoder
) -> None:
    picked = [
        ("one.png", 0),
        ("ball.png", 0),
        ("two.png", 1),
        ("two.png", NO_CAPTION),
        ("ball.png", NO_CAPTION),
    ]
    batch = batch_of(mixed, tower, picked)
    sigmas = torch.tensor([0.3, 0.6, 0.9, 0.5, 0.2])
    with torch.no_grad():
        loss, errors = flow_matching_loss(
            model, batch, sigmas, 3, variant=VARIANTS["full"], flow=Flow(), seed=7, tower=tower
        )
    refs = {
        "one.png": [folder / "one.ref.png"], "two.png": [folder / "two.ref1.png", folder / "two.ref2.png"],
    }  # fmt: skip
    expected = []
    for place, ((source, caption), sigma) in enumerate(zip(picked, sigmas.tolist())):
        sample = mixed.info(number_of(mixed, source))
        words = UNCONDITIONAL_PROMPT if caption == NO_CAPTION else sample.captions[caption]
        pixels = mixed.read(number_of(mixed, source), 0).patches
        if source in refs:
            images = [read_reference(path) for path in refs[source]]
            request = edit_request(tower, encoder, words, images, HEIGHT, WIDTH, 0)
        else:
            request = Request(encoder.embed(encoder.ids(words)), HEIGHT, WIDTH, 0)
        with torch.no_grad():
            expected.append(by_hand(model, request, pixels, sigma, place, caption == NO_CAPTION))
    assert torch.allclose(errors, torch.stack(expected), rtol=1e-4)
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)  # all have as many patches

    other = replace(batch, references=255 - batch.references)  # type: ignore[operator]
    with torch.no_grad():
        _, changed = flow_matching_loss(
            model, other, sigmas, 3, variant=VARIANTS["full"], flow=Flow(), seed=7, tower=tower
        )
    differs = (changed - errors).abs() > 1e-5
    assert differs.tolist() == [True, False, True, True, False]  # and nobody else's references are seen


def test_a_dropped_caption_leaves_the_references(mixed: Mixture, encoder: PromptEncoder) -> None:
    for source in ("one.png", "two.png"):
        said, unsaid = (mixed.read(number_of(mixed, source), caption) for caption in (1, NO_CAPTION))
        grids = [(seen.rows, seen.cols) for seen in unsaid.seen]
        assert unsaid.caption == "" and unsaid.input_ids.tolist() == encoder.ids(UNCONDITIONAL_PROMPT, grids)
        assert said.caption == "do as before, but otherwise"
        assert said.seen == unsaid.seen == encoder.seen(unsaid.input_ids.tolist(), grids)
        assert torch.equal(said.references[0][1], unsaid.references[0][1])
    assert mixed.read(number_of(mixed, "ball.png"), NO_CAPTION).input_ids.equal(mixed.empty.input_ids)


def test_all_tokens_are_counted_before_they_are_read(mixed: Mixture, tower: VisualTower) -> None:
    draws = Draws(mixed, 0, caption_dropout=0.5)
    picks = draws.take(0, 0, 60)
    samples = Reader(mixed, 0, 0.0).read(picks)
    assert {caption for caption in picks.caption.tolist()} == {0, 1, NO_CAPTION}
    for sample, tokens in zip(samples, picks.tokens.tolist()):
        batch = pack([sample], [0], len(sample.patches), eyes=tower.eyes)
        assert batch.layout.tokens == tokens and batch.patch_counts == [len(sample.patches)]
    longest = mixed.longest(1)[0]
    assert longest.source == "two.png"
    most = longest.longest_text + longest.patches + longest.reference_patches
    assert most >= picks.tokens.max()
    assert len(Packs(draws, most).of(0, 0)) >= 1
    with pytest.raises(HdlError, match=f"alone has {most} tokens"):
        Packs(draws, most - 1)


def test_a_mirrored_pair_is_mirrored_whole(mixed: Mixture) -> None:
    picks = Draws(mixed, 0, mirror=True).take(0, 0, 40)
    i = next(
        i for i in range(40)
        if picks.mirrored[i] and mixed.info(int(picks.sample[i])).source == "two.png"
    )  # fmt: skip
    turned, whole = Reader(mixed, 0, 0.0).read(picks[[i]])[0], mixed.read(int(picks.sample[i]), 0)  # type: ignore[index]

    def pictures(sample: Sample) -> list[Tensor]:
        grids = [((sample.rows, sample.cols), sample.patches), *sample.references]
        return [unpatchify(patches, *grid) for grid, patches in grids]

    for a, b in zip(pictures(turned), pictures(whole), strict=True):
        assert torch.equal(a, b.flip(1))


def test_a_lost_pairs_place_is_taken_by_one_that_fits() -> None:
    pair = {"references": [(1, 2)], "empty_tokens": 4, "text_tokens": [5]}
    infos = [info(0, shard="lost"), info(1, **pair), info(2, text_tokens=[4])]
    mixed = mixture(infos)
    mixed.sources[0].shards.lost.add("lost")  # type: ignore[attr-defined]
    for dropout in (0.0, 1.0):
        picks = Draws(mixed, 0, caption_dropout=dropout).take(0, 0, 3)
        i = int(np.flatnonzero(picks.sample == 0)[0])
        assert Reader(mixed, 0, 1.0).read(picks[[i]])[0].key == "s2"  # type: ignore[index]


def test_an_unchanged_pair_is_not_made_again(
    mixed: Mixture, run: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    before = [mixed.info(i) for i in range(3)]
    again = run(options=Options(area=80))
    assert (again.new, again.reused, again.pairs) == (0, 3, 2)
    assert list(Shards(tmp_path / "out").infos) == before
    put(folder, "one.ref.png", None, noise(96, 70, 8))  # lies the other way: other tokens, too
    assert (run(options=Options(area=80)).new, mixed.dataset_hash) != (
        0,
        Shards(tmp_path / "out").dataset_hash,
    )
    changed = next(i for i in Shards(tmp_path / "out").infos if i.source == "one.png")
    assert (changed.seen[0].rows, changed.seen[0].cols) != (before[1].seen[0].rows, before[1].seen[0].cols)


def test_pairs_prepared_by_an_earlier_hdl_are_to_be_prepared_again(tmp_path: Path) -> None:
    with pytest.raises(HdlError, match="1 of its samples are paired .* run tools/prepare.py again"):
        mixture([info(0), info(1, references=[(1, 1)])])


def test_a_processor_that_has_changed_since_is_noticed(mixed: Mixture, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    file = tmp_path / "base" / "preprocessor_config.json"
    said = json.loads(file.read_text())
    said["size"] = {"longest_edge": 40_000, "shortest_edge": 1024}
    file.write_text(json.dumps(said))
    pair = mixed.read(number_of(mixed, "one.png"), 0)
    with pytest.raises(
        HdlError, match="preprocessor_config.json has changed since; prepare the images again"
    ):
        pack([pair], [0], 6, eyes=Eyes(tmp_path / "base"))


def test_sizes_are_enough_to_know_the_grids(tower: VisualTower) -> None:
    for count, sizes in ((1, [(96, 64)]), (2, [(32, 320), (64, 64)]), (9, [(64, 96)] * 9)):
        assert len(sizes) == count
        view = tower.see([Image.new("RGB", size) for size in sizes])
        assert tower.eyes.grids_of(sizes) == view.grids
