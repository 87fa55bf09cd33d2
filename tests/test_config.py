from pathlib import Path

import pytest

from hdl.config import DECODER_LINEARS, load_run, save_run
from hdl.errors import HdlError

MINIMAL = '[model]\nbase = "b"\n[data]\nshards = "s"\n[save]\noutput = "o"\n'


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults_file_and_command_line_in_that_order(toml: Path) -> None:
    toml.write_text(MINIMAL + "[lora]\nrank = 8\nalpha = 4\n")
    run = load_run([str(toml), "--lora.rank", "16", "--resume", "--validation.prompts", '["a, b", "c"]'])
    assert (run.lora.rank, run.lora.alpha, run.lora.targets) == (16, 4.0, DECODER_LINEARS)
    assert run.resume and run.validation.prompts == ["a, b", "c"]
    assert run.model.base == Path("b") and run.train.betas == (0.9, 0.99)


def test_the_command_line_alone_can_describe_a_run() -> None:
    run = load_run(["--model.base", "b", "--data.shards", "s", "--save.output", "o", "--train.lr", "3e-4"])
    assert run.train.lr == 3e-4


def test_the_resolved_config_says_the_same_again(toml: Path, tmp_path: Path) -> None:
    toml.write_text(
        MINIMAL + "[lora.rank_pattern]\n'layers\\.[01]\\..*' = 4\n[lora.alpha_pattern]\nq_proj = 2.5\n"
    )
    run = load_run([str(toml), "--train.steps", "7", "--model.keep", "input"])
    assert run.lora.rank_pattern == {r"layers\.[01]\..*": 4} and run.lora.alpha_pattern == {"q_proj": 2.5}
    save_run(run, tmp_path / "saved.toml")
    assert load_run([str(tmp_path / "saved.toml")]) == run


@pytest.mark.parametrize(
    ("flags", "dropout"),
    [
        ([], 0.1),
        (["--data.trigger", "in red"], 0.0),
        (["--data.trigger", "in red", "--preserve.share", "0"], 0.1),
        (["--data.trigger", "in red", "--preserve.share", "0", "--preserve.regularization"], 0.0),
        (["--data.trigger", "in red", "--data.caption_dropout", "0.3"], 0.3),
        (["--data.caption_dropout", "0"], 0.0),
    ],
)
def test_captions_are_dropped_where_nothing_is_preserved(
    toml: Path, flags: list[str], dropout: float
) -> None:
    assert load_run([str(toml), *flags]).caption_dropout == dropout


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--validation.prompts", "a style, a red house"], "validation.prompts", ["a style, a red house"]),
        (["--validation.prompts", 'a "quoted" word'], "validation.prompts", ['a "quoted" word']),
        (["--validation.prompts", '["a, b", "c"]'], "validation.prompts", ["a, b", "c"]),
        (["--validation.prompts", "a, b", "--validation.prompts", "c"], "validation.prompts", ["a, b", "c"]),
        (["--validation.prompts", "[]"], "validation.prompts", []),
        (["--data.phrases", "b, c", "--data.trigger", "a"], "data.phrases", ["b, c"]),
        (["--model.keep", "input"], "model.keep", "input"),
        (["--model.keep", '["input", "everything"]'], "model.keep", ["input", "everything"]),
        (["--lora.targets", r".*\.[01]\.q_proj{1,2}"], "lora.targets", r".*\.[01]\.q_proj{1,2}"),
        (["--lora.targets", "all-linear"], "lora.targets", "all-linear"),
        (["--lora.targets", '["q_proj", "k_proj"]'], "lora.targets", ["q_proj", "k_proj"]),
        (["--train.betas", "0.9,0.95"], "train.betas", (0.9, 0.95)),
        (["--lora.rank_pattern", '{"q_proj": 8}'], "lora.rank_pattern", {"q_proj": 8}),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) and len(given) == 2 else None,
)
def test_lists_on_the_command_line(toml: Path, flags: list[str], field: str, value: object) -> None:
    section, name = field.split(".")
    assert getattr(getattr(load_run([str(toml), *flags]), section), name) == value


@pytest.mark.parametrize(
    ("extra", "flags", "message"),
    [
        ("[lora]\nrnak = 3\n", [], r"unknown option lora.rnak \(did you mean lora.rank\?\)"),
        ("[lroa]\nrank = 3\n", [], r"unknown option lroa \(did you mean lora\?\)"),
        ("", ["--lora.rnak", "3"], r"unrecognized arguments: --lora.rnak 3 \(did you mean lora.rank\?\)"),
        ("", ["--lora.rank", "x"], r"lora.rank: Input should be a valid integer.*found 'x'"),
        ("[train]\nlr = 'fast'\n", [], r"train.lr: Input should be a valid number.*found 'fast'"),
        ("", ["--train.steps", "0"], r"train.steps: Input should be greater than or equal to 1"),
        ("", ["--train.schedule", "cosine", "--train.steps", "10"], "warmup_steps 50 must be below steps 10"),
        ("", ["--train.batch_size", "6", "--train.micro_batch_size", "4"], "4 does not divide batch_size 6"),
        ("[validation]\nheight = 100\n", [], "validation.height: Input should be a multiple of 32"),
        ("[model]\nbase = 'twice'\n", [], "not readable as TOML"),
        (
            "[lora.rank_pattern]\n'q_proj(' = 4\n",
            [],
            r"lora: rank_pattern 'q_proj\(' is not a regular expression",
        ),
        ("", ["--lora.rank_pattern", "{q_proj"], r"command line: .*lora.rank_pattern.*written as JSON"),
        ("", ["--data.tags", "nsfw"], r"command line: .*data.tags.*written as JSON"),
        ("", ["--validation.prompts", "[a house"], r"command line: .*validation.prompts.*written as JSON"),
        ("[lora.rank_pattern]\nq_proj = 0\n", [], r"lora.rank_pattern.q_proj: .*greater than or equal to 1"),
    ],
)
def test_mistakes_are_named(toml: Path, extra: str, flags: list[str], message: str) -> None:
    toml.write_text(MINIMAL + extra)
    with pytest.raises(HdlError, match=message):
        load_run([str(toml), *flags])


def test_what_is_required_and_a_file_that_is_not_there() -> None:
    with pytest.raises(HdlError, match=r"^save\.output is required$"):
        load_run(["--model.base", "b", "--data.shards", "s"])
    with pytest.raises(HdlError, match=r"^model\.base is required$"):
        load_run(["--model.dtype", "float32", "--data.shards", "s", "--save.output", "o"])
    with pytest.raises(HdlError, match="nothing.toml: no such config"):
        load_run(["nothing.toml"])


def test_later_files_override_earlier_ones_field_by_field(tmp_path: Path) -> None:
    run, preset = tmp_path / "run.toml", tmp_path / "preset.toml"
    run.write_text(
        '[model]\nbase = "b"\nkeep = "input"\n[data]\nshards = "s"\n[save]\noutput = "o"\n[lora]\nrank = 8\n'
    )
    preset.write_text('[model]\nkeep = "products"\ncard = 24\n')
    described = load_run([str(run), str(preset), "--lora.rank", "4"])
    assert described.model.base == Path("b") and described.lora.rank == 4
    assert described.model.keep == "products" and described.model.card == 24
    with pytest.raises(HdlError, match=r"run\.toml, .*preset\.toml: unknown option model\.kep"):
        preset.write_text('[model]\nkep = "products"\n')
        load_run([str(run), str(preset)])


@pytest.mark.parametrize(
    "preset", sorted((Path(__file__).parents[1] / "launch/presets").glob("*.toml")), ids=lambda p: p.stem
)
def test_presets_are_valid_on_top_of_a_run(preset: Path) -> None:
    described = load_run(
        [str(preset), "--model.base", "b", "--data.shards", "s", "--save.output", "o"],
    )
    assert described.model.memory == "auto"
    assert described.model.card == float(preset.stem.removesuffix("gb").split("x")[-1])
    assert described.train.deepspeed.exists()
