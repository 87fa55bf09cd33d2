"""The config file and the flags: what is taken, and what is refused with which words."""

from pathlib import Path

import pytest

from hdl.caption.settings import Settings, load_settings
from hdl.data.captions import Look
from hdl.errors import HdlError


def test_flags_lie_over_the_file_and_descriptors_add_up(tmp_path: Path) -> None:
    file = tmp_path / "caption.toml"
    file.write_text(
        'trigger = "from file"\nbatch_size = 7\n[tag_descriptors]\nnsfw = "explicit"\nnight = "dark"\n'
        '[[replace]]\npattern = "^a "\nwith = "A "\n'
    )
    settings = load_settings(file, {"trigger": "from flag", "tag_descriptors": {"night": "black sky"}})
    assert (settings.trigger, settings.batch_size) == ("from flag", 7)
    assert settings.tag_descriptors == {"nsfw": "explicit", "night": "black sky"}
    assert settings.replace[0].with_ == "A "


def test_prompt_tells_the_image_s_style_and_tags() -> None:
    settings = Settings(prompt="A {style} picture, {tags}. {{braces}}")
    assert (
        settings.prompt_for(Look(style="ink", tags=["night", "rain"]))
        == "A ink picture, night, rain. {braces}"
    )
    assert settings.prompt_for(Look()) == "A unknown picture, none. {braces}"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("triger = 'x'", "unknown option triger (did you mean trigger?)"),
        ("batch_size = 0", "batch_size: Input should be greater than or equal to 1 (found 0)"),
        ("bits = 8", "bits: Input should be 4"),
        ("server = 'localhost:8000'", "server: String should match pattern '^https?://'"),
        ("trigger = ' '", "trigger: String should have at least 1 character"),
        ("captions_per_image = 2", "captions_per_image 2 needs a temperature above 0"),
        ("refusals = ['(']", "the pattern '(' is not a regular expression"),
        (r"replace = [{pattern = 'a', with = '\1'}]", r"with '\\1': invalid group reference 1"),
        ("replace = [{pattern = 'a', by = ''}]", "unknown option replace.0.by"),
        ("prompt = 'as {json}'", "found {json}, expected no braces but {style} and {tags}"),
        ("prompt = 'as {style!r:>9}'", "found {style!r:>9}"),
        ("prompt = 'as {'", "double a brace"),
        ("bits = 4\nserver = 'http://x/v1'", "bits is for a model that runs here"),
        ("= 3", "not readable as TOML"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "caption.toml").write_text(toml)
    with pytest.raises(HdlError) as error:
        load_settings(tmp_path / "caption.toml", {})
    assert str(error.value).startswith(str(tmp_path / "caption.toml"))
    assert message in str(error.value)
