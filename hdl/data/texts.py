"""Captions to token ids and text embeddings, many at a time.

The same as `PromptEncoder` gives one by one, which is what the tests hold it to. Opening the token table for
each caption would take longer than all else that is done for a small image, so rows are kept, a bounded number
of them.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from hdl.data.images import Skip
from hdl.data.samples import Tokens, bits_of
from hdl.errors import HdlError
from hdl.o1.layout import IMAGE_POSITION, Grid
from hdl.o1.prompt import PromptEncoder

ROWS_KEPT = 16384  # 128 MiB at 4096 numbers a row


class Texts:
    """A prompt encoder for captions by the thousand."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        # Takes memory only as it is filled.
        self._table = np.empty((ROWS_KEPT, encoder.checkpoint.config.hidden_size), np.uint16)
        self._slots: dict[int, int] = {}  # token -> row
        added = encoder.tokenizer.added_tokens_decoder
        special = [token.content for i, token in added.items() if token.special or i in encoder.image_ids]
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def identity(self) -> str:
        """Identifies how captions become token ids: a hash of the tokenizer and its chat template."""
        tokenizer = self.encoder.tokenizer
        known = [tokenizer.chat_template, tokenizer.backend_tokenizer.to_str(), self.encoder.image_ids]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def ids(self, captions: list[str]) -> list[list[int] | Skip]:
        """The token ids of each caption; a Skip where it is too long or would end the prompt by itself."""
        if not captions:
            return []
        tokenizer = self.encoder.tokenizer
        messages = [[{"role": "user", "content": caption}] for caption in captions]
        texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return [self._checked(caption, ids) for caption, ids in zip(captions, self._encoded(texts))]

    def beside(self, caption: str, images: Sequence[Grid]) -> list[int]:
        """The token ids of a caption after reference images of these grids; Skip where it is too long for that."""
        if skip := self._not_text(caption):
            raise skip
        try:
            return self.encoder.ids(caption, images)
        except HdlError as error:
            raise Skip("caption not usable", f"the caption cannot be used: {error}") from None

    def tokens(self, all_ids: list[list[int]]) -> Tokens:
        """The captions of one image, for its samples' bytes."""
        input_ids = [i for ids in all_ids for i in ids]
        token_ids = sorted(set(input_ids))
        missing = [i for i in token_ids if i not in self._slots]
        if missing:
            if len(self._slots) + len(missing) > len(self._table):
                self._slots, missing = {}, token_ids
            if len(missing) > len(self._table):
                self._table = np.empty((len(missing), self._table.shape[1]), np.uint16)
            start = len(self._slots)
            self._table[start : start + len(missing)] = bits_of(self.encoder.embed(missing))
            self._slots.update(zip(missing, range(start, start + len(missing))))
        rows = self._table.take([self._slots[i] for i in token_ids], axis=0)
        return Tokens(np.array(input_ids, np.int32), np.array(token_ids, np.int32), rows)

    def _encoded(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids, boi and tms included. As the tokenizer's own call makes them, which also finds out where each
        token stands in its text and spends a third of its time on it."""
        tokenizer = self.encoder.tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.encoder.tokenizer.split_special_tokens
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield encoding.ids + self.encoder.image_ids

    def _checked(self, caption: str, ids: list[int]) -> list[int] | Skip:
        if skip := self._not_text(caption):
            return skip
        if len(ids) > IMAGE_POSITION or max(ids) >= self.encoder.checkpoint.config.vocab_size:
            try:
                self.encoder.ids(caption)
            except HdlError as error:
                return Skip("caption not usable", f"the caption cannot be used: {error}")
        return ids

    def _not_text(self, caption: str) -> Skip | None:
        """Where it would end the prompt by itself, or stand for an image."""
        found = self._special.search(caption)
        return found and Skip(
            "caption not usable",
            f"the caption holds one of the model's own special tokens, {found[0]}; remove it",
        )
