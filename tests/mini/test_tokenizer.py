"""The small O1's tokenizer loads like the published one and loses nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hdl.mini.captions import loose_caption
from hdl.mini.scenes import imagine
from hdl.mini.tokenizer import SPECIAL_TOKENS, VOCABULARY, chat_ids, train_tokenizer, write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "o1-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(loose_caption(imagine(rng), rng) for _ in range(2000)), folder)
    return folder


@pytest.mark.parametrize(
    "text", ["a small red boat, on a calm sea", "kotonia style", "Übergröße 猫 \n\n 1234", " ", "<x>"]
)
def test_any_text_comes_back(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_token_each(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCABULARY
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [
        [VOCABULARY - len(SPECIAL_TOKENS) + i] for i in range(len(SPECIAL_TOKENS))
    ]
    published = json.loads((GOLDEN / "added_tokens.json").read_text())
    assert set(SPECIAL_TOKENS) == set(published)


def test_prompts_are_wrapped_as_in_the_published_checkpoint(folder: Path) -> None:
    ours, published = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(GOLDEN)
    for content in ["a red ball", [{"type": "image"}, {"type": "text", "text": "a red ball"}]]:
        wrapped = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            for tokenizer in (ours, published)
        ]
        assert wrapped[0] == wrapped[1]


def test_pretraining_reads_prompts_as_the_trainer_does(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in ["a big blue fish at the top", " "]:
        wrapped = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(wrapped, add_special_tokens=False)
        ids += tokenizer.convert_tokens_to_ids(["<|boi_token|>", "<|tms_token|>"])
        assert chat_ids(Tokenizer.from_file(str(folder / "tokenizer.json")), prompt) == ids
