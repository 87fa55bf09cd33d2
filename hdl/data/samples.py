"""A sample: what is known of it without reading it, and the bytes it is read from.

The bytes are safetensors:

    patches             uint8 [N, 3072]     the picture, row by row
    references          uint8 [M, 3072]     the pictures it was made from, one after another, where it is paired
    input_ids           int32 [L1+L2+...]   its captions' tokens, one caption after another, and those of the empty
                                            prompt after them where it is paired
    token_ids           int32 [U]           the different tokens among them, ascending
    token_embeds        bfloat16 [U, D]     their text embeddings

Unusual: text embeddings are rows of the base's token table, so each different token's row is kept once. A
further caption of a picture then costs little more than its token ids, also to read.

The captions of a pair begin with its references: as many image tokens as the visual tower makes of each. Dropping
the caption leaves them where they are, so a pair has an empty prompt of its own.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hdl.errors import HdlError
from hdl.o1.layout import Grid, Seen

NO_CAPTION = -1  # in a caption's place: the empty prompt
OF_PAIRS = ("seen", "empty_tokens")  # fields; only lines of pairs have them


@dataclass(frozen=True)
class SampleInfo:
    """One line of the samples file."""

    key: str
    shard: str  # file name of its shard
    offset: int  # of the safetensors bytes in the shard
    size: int  # of the safetensors bytes
    sha256: str  # of the safetensors bytes
    rows: int  # patches
    cols: int  # patches
    references: list[Grid]  # grids of the pictures it was made from; none: text to image
    text_tokens: list[int]  # L of each caption, boi and tms included
    captions: list[str]  # as trained, trigger and descriptors included; any of them describes the picture
    mirrored: bool  # may be trained mirrored: nothing in it has a right way round
    caption_sha256: str  # of the captions
    embeds_sha256: str
    source: str  # the image, relative to the images folder
    view: str | None  # which resolution ("512") or part ("crop1") of the image; None: there is only one
    style: str | None
    tags: list[str]
    note: str | None  # what the report says of this image
    image_sha256: str  # of the image file; of a pair, of all its files
    recipe: str  # hash of everything else the sample was made from: captions, options, base
    seen: list[Seen] = field(default_factory=list)  # where the references stand in each of its prompts
    empty_tokens: int = 0  # L of its own empty prompt; 0: it has none

    @property
    def patches(self) -> int:
        """Of the picture: those with a loss."""
        return self.rows * self.cols

    @property
    def reference_patches(self) -> int:
        return sum(rows * cols for rows, cols in self.references)

    @property
    def longest_text(self) -> int:
        """Tokens of the longest of its prompts."""
        return max(*self.text_tokens, self.empty_tokens)

    def tokens(self, caption: int = 0) -> int:
        """Of the whole sequence with one of its captions: text, patches, references' patches."""
        return self.text_tokens[caption] + self.patches + self.reference_patches


@dataclass(frozen=True)
class Prompt:
    """input_ids int64 [L], text_embeds bfloat16 [L, D]."""

    input_ids: Tensor
    text_embeds: Tensor


@dataclass(frozen=True)
class Sample:
    """patches uint8 [rows*cols, 3072], input_ids int64 [L], text_embeds bfloat16 [L, D], references: uint8
    [rows*cols, 3072] of each with its grid; seen: where they stand in the text."""

    key: str
    patches: Tensor
    rows: int
    cols: int
    input_ids: Tensor
    text_embeds: Tensor
    caption: str
    references: tuple[tuple[Grid, Tensor], ...] = ()
    seen: tuple[Seen, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """A sample's captions as they are kept."""

    input_ids: np.ndarray  # int32 [L1+L2+...]
    token_ids: np.ndarray  # int32 [U], ascending
    token_embeds: np.ndarray  # the bits of bfloat16, as uint16 [U, D]

    @classmethod
    def of(cls, prompts: list[Prompt]) -> "Tokens":
        ids = np.concatenate([prompt.input_ids.numpy() for prompt in prompts]).astype(np.int32)
        embeds = torch.cat([prompt.text_embeds for prompt in prompts])
        token_ids, first = np.unique(ids, return_index=True)  # a token's rows are all the same
        return cls(ids, token_ids, bits_of(embeds)[first])

    def embeds_sha256(self) -> str:
        return hashlib.sha256(self.token_embeds.data).hexdigest()


def bits_of(embeds: Tensor) -> np.ndarray:
    """bfloat16 -> the same bits as uint16, for numpy has no such type."""
    return embeds.contiguous().view(torch.uint16).numpy()


def payload_of(
    prompts: list[Prompt] | Tokens,
    patches: np.ndarray | Tensor | None = None,
    references: Sequence[np.ndarray | Tensor] = (),
) -> bytes:
    """A sample's bytes; the same for the same tensors. patches None: prompts alone."""
    tokens = prompts if isinstance(prompts, Tokens) else Tokens.of(prompts)
    parts = [
        ("input_ids", "I32", tokens.input_ids),
        ("token_ids", "I32", tokens.token_ids),
        ("token_embeds", "BF16", tokens.token_embeds),
    ]
    if patches is not None:
        parts.append(("patches", "U8", np.ascontiguousarray(patches)))
    if references:
        parts.append(("references", "U8", np.concatenate(references)))
    return _safetensors(parts)


def _safetensors(parts: list[tuple[str, str, np.ndarray]]) -> bytes:
    """What safetensors.torch.save writes, which takes longer than all else done for a small image. Parts by size
    of type, then by name."""
    header, end = [], 0
    for name, dtype, array in parts:
        start, end = end, end + array.nbytes
        shape = ",".join(map(str, array.shape))
        header.append(f'"{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}')
    described = f"{{{','.join(header)}}}".encode()
    described += b" " * (-len(described) % 8)
    return b"".join([len(described).to_bytes(8, "little"), described, *(array.data for _, _, array in parts)])


def sample_from(payload: bytes, info: SampleInfo, caption: int = 0) -> Sample:
    """The sample with one of its captions; a pair's caption may be NO_CAPTION. HdlError where the bytes are no
    safetensors."""
    tensors = _tensors(payload)
    lengths = [*info.text_tokens, info.empty_tokens] if info.empty_tokens else info.text_tokens
    prompt = _prompt(tensors, lengths, caption)
    references: list[tuple[Grid, Tensor]] = []
    if info.references:
        sizes = [rows * cols for rows, cols in info.references]
        parts = tensors["references"].split(sizes)
        references = [((rows, cols), part) for (rows, cols), part in zip(info.references, parts)]
    return Sample(
        info.key, tensors["patches"], info.rows, info.cols, prompt.input_ids, prompt.text_embeds,
        "" if caption == NO_CAPTION else info.captions[caption], tuple(references), tuple(info.seen),
    )  # fmt: skip


def prompt_from(payload: bytes) -> Prompt:
    """The only prompt of a payload."""
    tensors = _tensors(payload)
    return _prompt(tensors, [len(tensors["input_ids"])], 0)


def _prompt(tensors: dict[str, Tensor], lengths: list[int], caption: int) -> Prompt:
    ids = tensors["input_ids"].split(lengths)[caption]
    embeds = tensors["token_embeds"][torch.searchsorted(tensors["token_ids"], ids)]
    return Prompt(ids.long(), embeds)


def hash_of_embeds(prompts: list[Prompt]) -> str:
    """sha256 of the text embeddings' bytes, as they are kept."""
    return Tokens.of(prompts).embeds_sha256()


def hash_of_captions(captions: list[str]) -> str:
    return hashlib.sha256("\0".join(captions).encode()).hexdigest()


def info_to_json(info: SampleInfo, **placed: str | int) -> str:
    """A line of the samples file. placed: fields that are known by now and were not when `info` was made."""
    fields = vars(info) | placed
    if not info.references:
        fields = {name: value for name, value in fields.items() if name not in OF_PAIRS}
    else:
        fields = fields | {"seen": [(seen.start, seen.rows, seen.cols) for seen in info.seen]}
    return json.dumps(fields)


def info_from_json(line: str) -> SampleInfo:
    fields = json.loads(line)
    references = [(rows, cols) for rows, cols in fields["references"]]
    seen = [Seen(start, rows, cols) for start, rows, cols in fields.get("seen", ())]
    return SampleInfo(**fields | {"references": references, "seen": seen})


def _tensors(payload: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(payload)
    except SafetensorError as error:  # the hash was right: written by something that is not this hdl
        raise HdlError(
            f"a sample is not readable as safetensors ({error}); run tools/prepare.py again with the same options "
            "to make it anew"
        ) from None
