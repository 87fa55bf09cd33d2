"""A sample's bytes and back: each caption its own tokens and embeddings, to the bit."""

import dataclasses
from typing import Any

import pytest
import safetensors.torch
import torch

from hdl.data.samples import (
    Prompt,
    SampleInfo,
    Tokens,
    info_from_json,
    info_to_json,
    payload_of,
    sample_from,
)
from hdl.errors import HdlError

TABLE = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
CAPTIONS = [[3, 7, 7, 49, 0], [7], [49, 3, 12, 0, 3, 3]]


def prompt(ids: list[int]) -> Prompt:
    return Prompt(torch.tensor(ids), TABLE[ids])


def random_patches(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


@pytest.fixture
def info() -> SampleInfo:
    unsaid: dict[str, Any] = dict.fromkeys(SampleInfo.__dataclass_fields__)
    said = {"key": "k", "rows": 2, "cols": 3, "references": [(1, 2), (4, 1)], "captions": ["a", "b", "c"]}
    said |= {"seen": [], "empty_tokens": 0}
    return SampleInfo(**unsaid | said | {"text_tokens": [len(ids) for ids in CAPTIONS]})


def test_every_caption_and_reference_comes_back(info: SampleInfo) -> None:
    references = [random_patches(2), random_patches(4)]
    payload = payload_of([prompt(ids) for ids in CAPTIONS], random_patches(6), references)
    for i, ids in enumerate(CAPTIONS):
        sample = sample_from(payload, info, i)
        assert sample.caption == "abc"[i] and sample.input_ids.tolist() == ids
        assert torch.equal(sample.text_embeds, TABLE[ids])
        assert torch.equal(sample.patches, random_patches(6))
        assert [grid for grid, _ in sample.references] == [(1, 2), (4, 1)]
        assert all(torch.equal(ours, theirs) for (_, ours), theirs in zip(sample.references, references))
        assert info.tokens(i) == len(ids) + 6 + 6


def test_a_token_of_many_captions_is_kept_once(info: SampleInfo) -> None:
    one = payload_of([prompt(CAPTIONS[0])], random_patches(6))
    four = payload_of([prompt(CAPTIONS[0])] * 4, random_patches(6))
    assert len(four) - len(one) < 100  # three times five token ids


def test_a_line_of_the_samples_file_reads_back(info: SampleInfo) -> None:
    assert info_from_json(info_to_json(info)) == info
    other = dataclasses.replace(info, references=[])
    assert info_from_json(info_to_json(other)).tokens() == 5 + 6


def test_a_line_of_the_samples_file_says_where_the_sample_was_placed(info: SampleInfo) -> None:
    placed = dataclasses.replace(info, shard="shard-000000-1a2b3c4d.tar", offset=1536)
    assert info_to_json(info, shard=placed.shard, offset=placed.offset) == info_to_json(placed)


def test_bytes_that_are_no_safetensors(info: SampleInfo) -> None:
    with pytest.raises(HdlError, match="not readable as safetensors .*prepare.py again"):
        sample_from(b"nothing of the kind", info)


def test_bytes_are_those_that_safetensors_writes(info: SampleInfo) -> None:
    prompts = [prompt(ids) for ids in CAPTIONS]
    payload = payload_of(prompts, random_patches(6), [random_patches(2), random_patches(4)])
    assert payload == safetensors.torch.save(safetensors.torch.load(payload))
    assert payload_of(prompts) == safetensors.torch.save(safetensors.torch.load(payload_of(prompts)))
    arrays = [random_patches(count).numpy() for count in (6, 2, 4)]
    assert payload == payload_of(Tokens.of(prompts), arrays[0], arrays[1:])
