"""Captions by the thousand become what the prompt encoder makes of each."""

import pytest
import torch

from hdl.data import texts
from hdl.data.images import Skip
from hdl.data.samples import Prompt, Tokens
from hdl.data.texts import Texts
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.prompt import PromptEncoder
from tests.data.image_folders import BASE

CAPTIONS = [
    "a red house",
    "",
    "  two\n lines ",
    "café déjà vu 静夜思 🎨",
    "<im_end>x <| y |>",
    "word " * 300,
    "a red house",
]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(open_checkpoint(BASE))


def test_ids_are_the_encoders(encoder: PromptEncoder) -> None:
    assert Texts(encoder).ids(CAPTIONS) == [encoder.ids(caption) for caption in CAPTIONS]
    assert Texts(encoder).ids([]) == []


def test_ids_are_the_encoders_whatever_the_tokenizers_file_says_of_lengths() -> None:
    encoder = PromptEncoder(open_checkpoint(BASE))
    expected = [encoder.ids(caption) for caption in CAPTIONS]
    encoder.tokenizer.backend_tokenizer.enable_truncation(4)
    encoder.tokenizer.backend_tokenizer.enable_padding(length=8)
    assert Texts(encoder).ids(CAPTIONS) == expected


def test_captions_that_cannot_be_used(encoder: PromptEncoder) -> None:
    tokens = ["<|boi_token|>", "<|im_end|>", "<|im_start|>", "<|image_pad|>"]
    long, *special, good = Texts(encoder).ids(["word " * 5000, *(f"a {token} b" for token in tokens), "good"])
    assert isinstance(long, Skip) and "too long" in long.reason
    for skip, token in zip(special, tokens):
        assert isinstance(skip, Skip) and f"special tokens, {token}" in skip.reason
        with pytest.raises(Skip, match="special tokens"):
            Texts(encoder).beside(f"a {token} b", [])
    assert good == encoder.ids("good")


@pytest.mark.parametrize("kept", [16384, 20, 3])
def test_embeddings_are_the_encoders(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Also where fewer rows are kept than captions need."""
    monkeypatch.setattr(texts, "ROWS_KEPT", kept)
    ours = Texts(encoder)
    for captions in (CAPTIONS[:2], CAPTIONS[3:5], CAPTIONS[5:], CAPTIONS[:1]):
        ids = [encoder.ids(caption) for caption in captions]
        expected = Tokens.of([Prompt(torch.tensor(i), encoder.embed(i)) for i in ids])
        found = ours.tokens(ids)
        for name in ("input_ids", "token_ids", "token_embeds"):
            assert (getattr(found, name) == getattr(expected, name)).all()
            assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_identity_tells_tokenizers_apart(encoder: PromptEncoder) -> None:
    again = PromptEncoder(open_checkpoint(BASE))
    assert Texts(again).identity() == Texts(encoder).identity()
    again.tokenizer.chat_template += " "
    assert Texts(again).identity() != Texts(encoder).identity()
