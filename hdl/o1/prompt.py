"""From a prompt to token ids and text embeddings.

A prompt is wrapped by the checkpoint's own chat template as one user message with the generation
prompt added, then <|boi_token|> and one <|tms_token|> follow. Reference images stand before the prompt in the
message, each as many <|image_pad|> tokens as the visual tower makes of it. Ids of special tokens are looked up
in the tokenizer, never hard-coded. An embedding is the frozen token table's row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hdl.errors import HdlError
from hdl.o1.checkpoint import Checkpoint
from hdl.o1.layout import IMAGE_POSITION, Grid, Seen

BEGIN_OF_IMAGE = "<|boi_token|>"
TIMESTEP = "<|tms_token|>"
IMAGE_PAD = "<|image_pad|>"
UNCONDITIONAL_PROMPT = " "  # what guidance and caption dropout use for "no prompt"


class PromptEncoder:
    """A checkpoint's tokenizer and the rows of its token table."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.image_ids = [self._special(BEGIN_OF_IMAGE), self._special(TIMESTEP)]

    def ids(self, prompt: str, images: Sequence[Grid] = ()) -> list[int]:
        """The L token ids of a prompt, boi and tms included. images: the grids of tokens that the visual tower
        makes of the reference images."""
        content: Any = prompt
        if images:
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer.encode(text, add_special_tokens=False) + self.image_ids
        ids = self._with_room_for(ids, images)
        taken = len(ids) - sum(rows * cols - max(rows, cols) for rows, cols in images)  # positions
        if taken > IMAGE_POSITION:
            raise HdlError(
                f"a prompt of {len(ids)} tokens ({prompt[:60]!r}…) is too long: the image's positions start at "
                f"{IMAGE_POSITION}, and it takes {taken}; shorten it"
            )
        if max(ids) >= self.checkpoint.config.vocab_size:
            raise HdlError(
                f"the tokenizer in {self.checkpoint.folder} gives token {max(ids)}, the checkpoint's table has "
                f"{self.checkpoint.config.vocab_size} rows: it belongs to another model"
            )
        return ids

    def seen(self, ids: list[int], images: Sequence[Grid]) -> tuple[Seen, ...]:
        """Where the images stand among the ids of a prompt with images."""
        pad, found, token = self._special(IMAGE_PAD), [], 0
        for rows, cols in images:
            start = ids.index(pad, token)
            found.append(Seen(start, rows, cols))
            token = start + rows * cols
        return tuple(found)

    def _with_room_for(self, ids: list[int], images: Sequence[Grid]) -> list[int]:
        """The template's one <|image_pad|> an image -> as many as the image has tokens."""
        if not images:
            return ids
        pad = self._special(IMAGE_PAD)
        if ids.count(pad) != len(images):
            raise HdlError(
                f"the chat template and prompt give {ids.count(pad)} {IMAGE_PAD} for {len(images)} reference images; "
                f"expected one each: the template in {self.checkpoint.folder} has no images, or the prompt holds "
                "that token itself"
            )
        sizes = iter(rows * cols for rows, cols in images)
        return [token for i in ids for token in ([pad] * next(sizes) if i == pad else [i])]

    def embed(self, ids: list[int]) -> Tensor:
        """bfloat16 [len(ids), D]."""
        return self.checkpoint.token_rows(ids)

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise HdlError(
                f"the tokenizer in {self.checkpoint.folder} has no {token}: it is not O1's tokenizer"
            )
        return token_id


def load_tokenizer(folder: Path):  # type: ignore[no-untyped-def]  # transformers' classes carry no useful type
    """The checkpoint's tokenizer from local files only; HdlError when there is none."""
    from transformers import AutoTokenizer  # slow to import, and training from shards never needs it

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise HdlError(
            f"{folder}: no tokenizer there (neither tokenizer.json nor vocab.json); copy the published "
            "tokenizer files beside config.json, or point config_from at a folder that has them"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise HdlError(f"{folder}: its tokenizer files do not load ({error})") from None
    if not tokenizer.chat_template:
        raise HdlError(
            f"{folder}: the tokenizer has no chat template; copy the published chat_template.jinja (or the "
            "tokenizer_config.json that holds it) there"
        )
    return tokenizer
