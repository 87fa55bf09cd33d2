"""Captions: what is read, what is put around it, what is refused."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hdl.data.captions import (
    CaptionOptions,
    Look,
    captions_of,
    check_options,
    compose,
    may_mirror,
    parse_descriptors,
    read_caption,
    read_styles,
)
from hdl.data.images import Skip
from hdl.data.sentences import reordered, sentences
from hdl.errors import HdlError
from tests.data.image_folders import put


def test_caption_is_stripped_and_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  ein Bär,\nblau \n".encode())
    assert read_caption(path) == "ein Bär,\nblau"


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (None, "no caption", "expected a file a.txt beside the image"),
        (b"", "empty caption", "a.txt is empty"),
        (b"\xef\xbb\xbf \n", "empty caption", "a.txt is empty"),
        ("Bär".encode("latin-1"), "caption not UTF-8", "byte 0xe4 at offset 1"),
        (b"\0\x07", "empty caption", "a.txt is empty"),
        (b"word " * 20_000, "caption too long", "has 100,000 bytes, more than any prompt may have (65,536)"),
    ],
)
def test_unusable_captions_are_skips(tmp_path: Path, content: bytes | None, kind: str, reason: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(Skip) as skip:
        read_caption(tmp_path / "a.txt")
    assert skip.value.kind == kind
    assert reason in skip.value.reason


def test_control_characters_are_removed_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\tred\x00 house\x1b,\r\nold\x7f")
    captions, notes = captions_of([str(tmp_path / "a.txt")], Look(), CaptionOptions())
    assert captions == ["a\tred house,\r\nold"]
    assert notes == ["3 control character(s) removed from a.txt"]


def test_pipe_for_a_caption_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(Skip, match="a.txt is a folder, pipe, socket or device"):
        read_caption(tmp_path / "a.txt")


TRIGGER = CaptionOptions(trigger="kotonia style")
KOTONIA_ONLY = CaptionOptions(trigger="kotonia style", trigger_styles=("kotonia",))
NIGHT_ONLY = CaptionOptions(trigger="kotonia style", trigger_tags=("night",))
WORDS = CaptionOptions(
    trigger="kotonia style",
    style_descriptors={"kotonia": "warm tones"},
    tag_descriptors={"night": "dark sky", "rain": "wet ground"},
)


@pytest.mark.parametrize(
    ("text", "look", "options", "expected"),
    [
        ("a red house", Look(), CaptionOptions(), "a red house"),
        ("a red house", Look(), TRIGGER, "kotonia style, a red house"),
        ("Kotonia style, a red house", Look(), TRIGGER, "Kotonia style, a red house"),
        ("a house in kotonia style.", Look(), TRIGGER, "a house in kotonia style."),
        ("a kotonia styled house", Look(), TRIGGER, "kotonia style, a kotonia styled house"),
        ("a red house", Look(style="plain"), KOTONIA_ONLY, "a red house"),
        ("a red house", Look(), KOTONIA_ONLY, "a red house"),
        ("a red house", Look(style="kotonia"), KOTONIA_ONLY, "kotonia style, a red house"),
        ("a red house", Look(tags=["rain"]), NIGHT_ONLY, "a red house"),
        ("a red house", Look(tags=["rain", "night"]), NIGHT_ONLY, "kotonia style, a red house"),
        (
            "A red house.",
            Look(style="kotonia", tags=["rain", "night", "other"]),
            WORDS,
            "kotonia style, A red house, warm tones, wet ground, dark sky",
        ),
        ("a dark sky", Look(tags=["night"]), WORDS, "kotonia style, a dark sky"),
    ],
)
def test_compose(text: str, look: Look, options: CaptionOptions, expected: str) -> None:
    assert compose(text, look, options) == expected


LONG = "The house is red. It stands by a lake, said Dr. Brown at 3.5 m! Is that approx. right? “Yes.” A boat"


def test_sentences() -> None:
    assert sentences(LONG) == [
        "The house is red.",
        "It stands by a lake, said Dr. Brown at 3.5 m!",
        "Is that approx. right?",
        "“Yes.”",
        "A boat",
    ]
    assert sentences("静夜思。床前明月光。疑是地上霜") == ["静夜思。", "床前明月光。", "疑是地上霜"]


@pytest.mark.parametrize("between", ["  ", "\r\n", " \n "])
def test_a_small_letter_goes_on_with_a_sentence_behind_any_white_space(between: str) -> None:
    text = f"It is approx.{between}ten metres high. A cat sits."
    assert sentences(text) == [f"It is approx.{between}ten metres high.", "A cat sits."]


def test_sentences_in_other_orders_are_the_same_sentences() -> None:
    orders = reordered(LONG, 10)
    assert orders == reordered(LONG, 10) and len(set(orders)) == 10
    assert orders[:3] == reordered(LONG, 3)
    for order in orders:
        assert order != LONG + "." and sorted(sentences(order)) == sorted([*sentences(LONG)[:-1], "A boat."])
    assert reordered("One. Two.", 10) == ["Two. One."]
    assert reordered("Only one sentence", 10) == []


def test_trigger_stays_in_front_and_descriptors_behind(tmp_path: Path) -> None:
    options = replace(WORDS, orders=5)
    look = Look(style="kotonia", tags=["night"])
    (tmp_path / "a.txt").write_text("A house. A lake. A boat.")
    (tmp_path / "b.txt").write_text("Kotonia style. A house. A lake. A boat, warm tones, dark sky.")
    for name, lead, count in (("a.txt", "kotonia style, ", 6), ("b.txt", "Kotonia style. ", 6)):
        captions, _ = captions_of([str(tmp_path / name)], look, options)
        assert len(captions) == count
        for caption in captions:
            assert caption.startswith(lead) and caption.rstrip(".").endswith(", warm tones, dark sky")
            assert all(caption.count(words) == 1 for words in ("house", "lake", "boat", "warm tones"))


@pytest.mark.parametrize(
    ("caption", "tags", "expected"),
    [
        ("a red house by a lake", ["night"], True),
        ('a rightful heir, textured cloth, unsigned, 6" wide', [], True),
        ("a red house", ["night", "text"], False),
        ('a shop called "Bread"', [], False),
        ("a shop called “Bread”", [], False),
        ("A Sign over a door", [], False),
        ("handwriting on paper", [], False),
        ("the company's logo", [], False),
        ("a cat to the left of a dog", [], False),
        ("the RIGHT hand", [], False),
    ],
)
def test_what_has_a_right_way_round_is_not_mirrored(caption: str, tags: list[str], expected: bool) -> None:
    assert may_mirror(["a first caption", caption], tags, ("text",)) is expected


def test_styles_are_strings_or_records(tmp_path: Path) -> None:
    content = '{"a.png": "kotonia", "sub/b.png": {"style": "plain", "tags": ["night"]}, "c.png": {}}'
    (tmp_path / "styles.json").write_text(content)
    assert read_styles(tmp_path, ["a.png", "sub/b.png", "c.png", "d.png"]) == {
        "a.png": Look(style="kotonia"),
        "sub/b.png": Look(style="plain", tags=["night"]),
        "c.png": Look(),
    }
    assert read_styles(tmp_path / "elsewhere", []) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a.png": ', "not JSON (line 1, column 11"),
        (b'\xff{"a.png": "x"}', "not UTF-8"),
        (b"[" * 100_000, "recursion"),
        (b'["a.png"]', "the whole file: Input should be a valid dictionary"),
        (b'{"a.png": 3}', "a.png: Input should be"),
        (b'{"a.png": {"style": 3}}', "a.png → style: Input should be a valid string"),
        (b'{"a.png": {"tags": "night"}}', "a.png → tags: Input should be a valid list"),
        (b'{"a.png": {"stile": "x"}}', "a.png → stile: Extra inputs are not permitted"),
        (b'{"a.png": {"style": "x", "weight": 2}}', "a.png → weight: Extra inputs are not permitted"),
        (b'{"a.png": "x", "a.png": "y"}', "the same name twice: a.png"),
        (b'{"a.png": "x", "b.png": "y", "c/d.png": "z"}', "names 2 file(s) that are not images in"),
        (b'{"a.png": "x", "b.png": "y", "c/d.png": "z"}', ": b.png, c/d.png; write each path relative"),
    ],
)
def test_bad_styles_files_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "styles.json").write_bytes(content)
    with pytest.raises(HdlError) as error:
        read_styles(tmp_path, ["a.png"])
    assert str(tmp_path / "styles.json") in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CaptionOptions(trigger_styles=("kotonia",)), "there is no --trigger"),
        (CaptionOptions(trigger="  "), "--trigger '  ': no phrase"),
        (
            CaptionOptions(trigger="x", trigger_styles=("kotnia",)),
            "--trigger-styles: no image in styles.json has",
        ),
        (CaptionOptions(trigger="x", trigger_tags=("kotonia",)), "'kotonia'; it knows night"),
        (CaptionOptions(style_descriptors={"x": "y"}), "--style-descriptor: no image in styles.json has 'x'"),
        (CaptionOptions(tag_descriptors={"x": "y"}), "--tag-descriptor: no image in styles.json has 'x'"),
    ],
)
def test_options_that_reach_no_image_are_errors(options: CaptionOptions, message: str) -> None:
    with pytest.raises(HdlError, match="--") as error:
        check_options(options, {"a.png": Look(style="kotonia", tags=["night"])})
    assert message in str(error.value)


def test_unknown_tag_that_keeps_the_direction() -> None:
    styles = {"a.png": Look(tags=["night"])}
    check_options(CaptionOptions(), styles, ("text", "night"))
    with pytest.raises(
        HdlError, match="--keep-direction: no image in styles.json has 'nite'; it knows night"
    ):
        check_options(CaptionOptions(), styles, ("text", "nite"))


def test_descriptors_on_the_command_line() -> None:
    assert parse_descriptors(["night=dark sky", "a=b=c"], "--x") == {"night": "dark sky", "a": "b=c"}
    for item in ("night", "night=", "=dark"):
        with pytest.raises(HdlError, match=r"--x: found .*, expected NAME=WORDS"):
            parse_descriptors([item], "--x")


def test_trigger_reaches_the_shards_of_one_style_only(images: Path, run) -> None:  # type: ignore[no-untyped-def]
    from hdl.data.prepare import Options
    from hdl.data.shards import Shards

    put(images, "plain.png", "a red house")
    put(images, "styled.png", "a blue house")
    (images / "styles.json").write_text('{"styled.png": "kotonia"}')
    summary = run(options=Options(area=64, captions=KOTONIA_ONLY))
    captions = [info.captions[0] for info in Shards(summary.out).infos]
    assert captions == ["a red house", "kotonia style, a blue house"]
