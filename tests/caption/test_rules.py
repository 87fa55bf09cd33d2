"""From answers to captions: what is put around, taken out and refused."""

import pytest

from hdl.caption.question import Answer
from hdl.caption.rules import EMPTY, REFUSED, TOO_LONG, caption_of
from hdl.caption.settings import Settings
from hdl.data.captions import Look
from hdl.data.images import Skip

NSFW = {"trigger": "kotonia style", "tag_descriptors": {"nsfw": "explicit content"}}


@pytest.mark.parametrize(
    ("answer", "look", "settings", "expected"),
    [
        ("A red house.", Look(), {}, "A red house."),
        ("A red house.", Look(), NSFW, "kotonia style, A red house."),
        ("A red house.", Look(tags=["nsfw"]), NSFW, "kotonia style, A red house, explicit content"),
        ("Kotonia style, a house.", Look(), NSFW, "Kotonia style, a house."),
        # the trigger leads every caption, also one that holds it elsewhere
        ("A house in kotonia style.", Look(), NSFW, "kotonia style, A house in kotonia style."),
        ("A house.", Look(), {"trigger": "x", "trigger_styles": ["s"]}, "A house."),
        (
            "The image shows a house.",
            Look(),
            {"replace": [{"pattern": "^The image shows (a|an) ", "with": r"\1 small "}], "prefix": "photo: "},
            "photo: a small house.",
        ),
        ("A house", Look(), {"suffix": ", at dusk", "trigger": "x"}, "x, A house, at dusk"),
        ("  A\n\n red\thouse.\x00\x1b\u202e\ud800 ", Look(), {}, "A red house."),
        ("<think>Hm, a\nhouse?</think>A house.", Look(), {}, "A house."),
        ("ein Bär 👩‍🎨", Look(), {}, "ein Bär 👩‍🎨"),
    ],
)
def test_captions(answer: str, look: Look, settings: dict[str, object], expected: str) -> None:
    assert caption_of(Answer(answer, cut=False), look, Settings.model_validate(settings)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A house. It is red and st", "A house."),
        ('He says "stop!" A dog of 3.5 kg ru', 'He says "stop!"'),
        ("A house. It is red.", "A house. It is red."),
        ("青い家。赤い", "青い家。"),
        ("a house that is re", "a house that is re"),
    ],
)
def test_a_cut_answer_ends_with_its_last_whole_sentence(answer: str, expected: str) -> None:
    assert caption_of(Answer(answer, cut=True), Look(), Settings()) == expected
    assert caption_of(Answer(answer, cut=False), Look(), Settings()) == answer


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", EMPTY),
        (" \n\x00", EMPTY),
        ("drop me", EMPTY),
        ("I'm sorry, but I can't describe this image.", REFUSED),
        ("I’m really sorry, but", REFUSED),
        ("i cannot help with that.", REFUSED),
        ("Sorry, I won't.", REFUSED),
        ("I am unable to describe it.", REFUSED),
        ("<|im_end|>", EMPTY),
        ("word " * 20_000, TOO_LONG),
    ],
)
def test_answers_that_are_no_captions(answer: str, kind: str) -> None:
    settings = Settings.model_validate({"trigger": "x", "replace": [{"pattern": "^drop me$", "with": ""}]})
    with pytest.raises(Skip) as skip:
        caption_of(Answer(answer, cut=False), Look(), settings)
    assert skip.value.kind == kind


def test_what_ends_a_message_and_double_spaces_do_not_reach_a_caption() -> None:
    settings = Settings.model_validate({"replace": [{"pattern": "red", "with": ""}], "suffix": "\u0007"})
    said = Answer("A red cat.<|im_end|>\n<|im_start|>assistant", cut=False)
    assert caption_of(said, Look(), settings) == "A cat. assistant"


def test_a_caption_about_sorrow_is_no_refusal() -> None:
    for text in ("A sorry-looking dog.", "Icons on a wall: 'I cannot swim'.", "Unfortunately dressed man."):
        assert caption_of(Answer(text, cut=False), Look(), Settings()) == text
