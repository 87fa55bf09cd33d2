"""What is told of a folder's captions."""

from hdl.caption.summary import Phrase, repeated


def test_shared_phrases_are_found_once_and_at_their_longest() -> None:
    captions = [
        f"kotonia style, The image shows a {thing} against a dark blue sky."
        for thing in ("cat", "dog", "car")
    ]
    captions += ["kotonia style, A man. He stands against a dark, blue sky!", "nothing", "of this", "kind"]
    assert repeated(captions, ["kotonia style"]) == [
        Phrase("against a dark blue sky", 4, 0),
        Phrase("the image shows a", 3, 3),
    ]


def test_phrases_of_few_captions_are_not_told() -> None:
    few = ["a cat on a red mat"] * 4
    assert [phrase.words for phrase in repeated(few, [])] == ["a cat on a red mat"]
    assert repeated(few + [str(n) for n in range(96)], []) == []
