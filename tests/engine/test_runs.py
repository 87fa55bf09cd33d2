"""Whole runs: the same numbers however they are spread, and nothing lost in between."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hdl.adapter.metadata import BASE, DATASET, LICENSE, RANK, STEPS, TITLE, TRIGGER
from hdl.sample.draw import draw_prompts
from hdl.sample.generate import SamplerSettings
from tests.browser import needs_browser, see
from tests.engine.conftest import Finished, Launch

# float32 on CPUs: sums are taken in another order on another number of ranks, and Adam's first steps
# amplify what differs; losses after four steps still agree to this.
RELATIVE = 2e-5


def adapter(run: Finished) -> dict[str, torch.Tensor]:
    return load_file(run.output / "adapter" / "adapter_model.safetensors")


def assert_same_losses(one: Finished, other: Finished) -> None:
    first, second = one.curve("loss"), other.curve("loss")
    assert first.keys() == second.keys() == {1, 2, 3, 4}
    for step in first:
        assert first[step] == pytest.approx(second[step], rel=RELATIVE), step
    # AdamW hides a wrongly scaled gradient; its norm does not.
    assert one.curve("grad_norm") == pytest.approx(other.curve("grad_norm"), rel=1e-3)
    weights, others = adapter(one), adapter(other)
    for name in weights:
        error = (weights[name] - others[name]).norm() / weights[name].norm()
        assert error < 1e-3, (name, float(error))


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    return []


PICTURES = {
    "validation__prompts": ["a cat", "a rocket", "coins"],
    "validation__height": 64,
    "validation__width": 32,
    "validation__steps": 3,
    "data__trigger": "a photograph",
    # With it, no step hangs on what Adam made of the first gradients of the kept draws, which are next to nothing: at 0.2
    # rounding grows to 7e-5 of the fourth step's distance from the base, whose gradient is 60 times the first step's.
    "preserve__share": 0.25,
    "save__license": "CC0-1.0",
}


def one_rank(launch: Launch, memo: list[Finished]) -> Finished:
    """The run the others are held to: one process, ZeRO-2, the whole batch in one pack."""
    if not memo:
        memo.append(launch("alone", **PICTURES))
        assert memo[0].status == 0, memo[0].printed
    return memo[0]


def test_a_run_leaves_everything_it_promises(launch: Launch, alone: list[Finished]) -> None:
    run = one_rank(launch, alone)
    names = {p.name for p in (run.output / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000004"}
    losses = run.curve("loss")
    assert all(math.isfinite(loss) for loss in losses.values())
    wanted = ["grad_norm", "lr", "speed/images_per_second", "speed/tokens_per_second", "memory/peak_gib"]
    assert set(wanted) <= set(run.curve_names())
    assert sum(name.startswith("x0_error/sigma_") for name in run.curve_names()) == 4
    assert run.curve("lr") == pytest.approx({1: 0.0, 2: 5e-3, 3: 1e-2, 4: 1e-2})
    pictures = sorted((run.output / "pictures").iterdir())
    assert [p.name for p in pictures] == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert "loss" in run.printed and "images/s" in run.printed
    with safe_open(run.output / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        about = file.metadata()
    trained_on = json.loads((run.output / "checkpoints/step-000004/trainer_state.json").read_text())
    expected = {TRIGGER: "a photograph", LICENSE: "CC0-1.0", STEPS: "4", RANK: "4", TITLE: "a photograph"}
    expected |= {BASE: trained_on["base"], DATASET: trained_on["data"]}
    assert {name: about[name] for name in expected} == expected

    def halves(path: Path) -> tuple[bytes, bytes]:  # of the first row of the grid
        sheet = Image.open(path)
        return sheet.crop((8, 21, 104, 213)).tobytes(), sheet.crop((112, 21, 208, 213)).tobytes()

    before, after = halves(pictures[0]), halves(pictures[-1])
    assert before[0] == before[1] == after[0]  # the adapter starts as nothing, and can be switched off
    assert after[1] != after[0]


@needs_browser
def test_a_run_ends_with_a_page_that_shows_it(launch: Launch, alone: list[Finished], tmp_path: Path) -> None:
    run = one_rank(launch, alone)
    page = run.output / "summary.html"
    assert f"summary: {page}" in run.printed
    html = page.read_text(encoding="utf-8")
    assert "a photograph" in html and str(run.output / "adapter") in html
    curves = {re.sub("/sigma_.*", " by sigma", name) for name in run.curve_names()}
    assert curves == set(re.findall('<svg [^>]*aria-label="(.*?)"', html))
    seen = see(page, tmp_path)
    assert (seen.images, seen.alts) == (3, ["after 4 steps"])
    assert (seen.broken, seen.console, seen.fetched) == ([], [], [])
    assert seen.drawn >= 8


def test_a_page_that_cannot_be_written_costs_a_line(launch: Launch) -> None:
    begun = launch(train__steps=2)
    assert begun.status == 0, begun.printed
    (begun.output / "summary.html").unlink()
    (begun.output / "summary.html").mkdir()
    resumed = launch(train__steps=4, resume=True)
    assert resumed.status == 0, resumed.printed
    assert "no summary was written: " in resumed.printed and f"adapter: {resumed.output}" in resumed.printed


@pytest.mark.parametrize(
    ("processes", "stage", "options"),
    [
        (2, "zero2", {}),
        # Drift takes a hundred forward passes, each of which DeepSpeed gathers tensor by tensor: once will do.
        (2, "zero3", {"validation__every": 4}),
        (1, "zero3", {"train__micro_batch_size": 2, "validation__drift": False}),
        (2, "zero2", {"train__micro_batch_size": 1, "model__keep": "input"}),
    ],
)
def test_losses_do_not_depend_on_how_a_step_is_spread(
    launch: Launch, alone: list[Finished], processes: int, stage: str, options: dict
) -> None:
    run = launch(processes=processes, train__deepspeed=f"ds_configs/{stage}.json", **PICTURES, **options)
    assert run.status == 0, run.printed
    assert_same_losses(one_rank(launch, alone), run)
    last = "pictures/step-000004.png"
    ours, theirs = (np.asarray(Image.open(r.output / last), int) for r in (run, one_rank(launch, alone)))
    assert np.abs(ours - theirs).max() <= 3  # enlarged by a filter that overshoots


def test_pictures_are_those_of_the_saved_adapter(
    launch: Launch, alone: list[Finished], tiny_base: Path
) -> None:
    run = one_rank(launch, alone)
    drawn = draw_prompts(
        tiny_base, PICTURES["validation__prompts"], SamplerSettings("full", 3, 5.0, 3.0),
        seeds=range(3), adapter=run.output / "adapter", height=64, width=32, together=2, device="cpu",
    )  # fmt: skip
    sheet = np.asarray(Image.open(run.output / "pictures" / "step-000004.png"), int)
    for i, drawing in enumerate(drawn):
        enlarged = np.asarray(drawing.image.resize((96, 192), Image.Resampling.LANCZOS), int)
        top = 21 + i * (192 + 13 + 8)
        assert np.abs(sheet[top : top + 192, 112:208] - enlarged).max() <= 3


def test_every_step_is_reported_under_its_own_number(launch: Launch) -> None:
    """Whether it is looked at right after it was taken, before a save, or only while the next is computed."""
    each = launch("each", save__every=1, train__steps=5)
    never = launch("never", save__every=100, train__steps=5)
    assert each.status == never.status == 0, each.printed + never.printed
    for name in ("loss", "grad_norm", "lr", "x0_error/sigma_0.00-0.25"):
        assert each.curve(name).keys() == {1, 2, 3, 4, 5}, name
        assert each.curve(name) == never.curve(name), name
    assert len(set(each.curve("loss").values())) == len(set(each.curve("grad_norm").values())) == 5
    speed, pace = (never.curve(f"speed/{name}") for name in ("images_per_second", "seconds_per_step"))
    assert all(speed[step] == pytest.approx(4 / pace[step], rel=1e-5) for step in range(1, 6))
    assert "5 steps, median" in each.printed and "5 steps, median" in never.printed


def test_a_validation_that_a_stopped_run_did_not_come_to_is_made_up_for(launch: Launch) -> None:
    """The checkpoint of its step is written before it."""
    options = {name: PICTURES[name] for name in PICTURES if name.startswith("validation")}
    options["validation__drift"] = False
    whole = launch(**options)
    assert whole.status == 0, whole.printed
    picture, validated = whole.output / "pictures/step-000004.png", whole.output / "validated"
    drawn = picture.read_bytes()
    for last, made_up in (("4", False), ("2", True), ("not a number", True)):
        picture.unlink(missing_ok=True)
        validated.write_text(last)
        again = launch(resume=True, **options)
        assert again.status == 0, again.printed
        assert picture.exists() is made_up and ("pictures after 4 steps" in again.printed) is made_up
        assert not made_up or picture.read_bytes() == drawn
        assert validated.read_text().strip() == "4"


def test_resuming_continues_as_if_nothing_had_happened(launch: Launch) -> None:
    """Dropout, schedule, data and noise included; saved on two ranks with ZeRO-3, resumed on one with ZeRO-2."""
    options = {"lora__dropout": 0.0, "train__schedule": "cosine", "data__caption_dropout": 0.5}
    whole = launch("whole", **options)
    assert whole.status == 0, whole.printed
    half = launch("half", processes=2, train__deepspeed="ds_configs/zero3.json", train__steps=4, **options)
    assert half.status == 0, half.printed
    for folder in ("checkpoints/step-000004", "adapter"):
        for file in (half.output / folder).iterdir():
            file.unlink()
        (half.output / folder).rmdir()
    resumed = launch("half", resume=True, **options)
    assert resumed.status == 0, resumed.printed
    assert "resuming after step 2" in resumed.printed
    assert_same_losses(whole, resumed)


def test_resuming_on_the_same_ranks_is_bit_equal(launch: Launch) -> None:
    options = {
        "lora__dropout": 0.3,
        "train__schedule": "cosine",
        "data__caption_dropout": 0.5,
        "processes": 2,
    }
    whole = launch("whole", **options)
    again = launch("again", **options)
    assert whole.status == again.status == 0, whole.printed + again.printed
    first, second = adapter(whole), adapter(again)
    assert all(torch.equal(first[n], second[n]) for n in first)  # a run repeats itself to the bit
    without = launch("without", **(options | {"lora__dropout": 0.0}))
    assert without.curve("loss")[1] == whole.curve("loss")[1]  # the adapter is still nothing
    assert without.curve("loss")[4] != whole.curve("loss")[4]
    newest = again.output / "checkpoints" / "step-000004"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = launch("again", resume=True, **options)
    assert resumed.status == 0, resumed.printed
    third = adapter(resumed)
    assert all(torch.equal(first[n], third[n]) for n in first)


def test_the_dev_variant_and_every_other_way_to_flow(launch: Launch) -> None:
    run = launch(
        model__variant="dev",
        lora__rslora=True,
        lora__dropout=0.1,
        flow__sigma="logit_normal",
        flow__logit_mean=0.5,
        flow__shift=3.0,
        flow__weighting="velocity",
        train__steps=2,
        validation__prompts=["a cat"],
        validation__height=32,
        validation__width=32,
    )
    assert run.status == 0, run.printed
    losses = run.curve("loss")
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses.values())
    x0_errors = [run.curve(n)[1] for n in run.curve_names() if n.startswith("x0_error") and 1 in run.curve(n)]
    assert losses[1] > 1.5 * max(x0_errors)  # weighted by 1/sigma^2
    assert len(list((run.output / "pictures").iterdir())) == 2
