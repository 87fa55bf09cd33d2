"""Sources of samples that exist as numbers only, or as pictures made when they are read."""

import hashlib
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hdl.data.fetch import ShardLost
from hdl.data.mixture import Mixture, Source
from hdl.data.samples import Prompt, Sample, SampleInfo

DIM = 8
EMPTY = Prompt(torch.zeros(3, dtype=torch.int64), torch.zeros(3, DIM, dtype=torch.bfloat16))


def info(i: int, **said: Any) -> SampleInfo:
    unsaid: dict[str, Any] = dict.fromkeys(SampleInfo.__dataclass_fields__)
    usual = {
        "key": f"s{i}", "shard": "a", "rows": 1, "cols": 1, "references": [], "text_tokens": [5], "captions": ["c"],
        "mirrored": False, "seen": [], "empty_tokens": 0, "source": f"{i}.png", "tags": [], "image_sha256": hashlib.sha256(b"%d" % i).hexdigest(),
    }  # fmt: skip
    return SampleInfo(**unsaid | usual | said)


@dataclass
class FakeShards:
    """What of Shards a mixture uses. lost: shards that cannot be read; prefetched: what was asked for, last."""

    infos: list[SampleInfo]
    lost: set[str] = field(default_factory=set)
    prefetched: list[str] = field(default_factory=list)
    empty: Prompt = EMPTY
    dataset_hash: str = "hash"
    home: Any = field(default_factory=lambda: SimpleNamespace(shown="somewhere"))

    def read(self, i: int, caption: int = 0) -> Sample:
        """Its pixels and embeddings say which sample it is."""
        one = self.infos[i]
        if one.shard in self.lost:
            raise ShardLost(one.shard, f"{one.shard} is gone")
        pixels = np.random.default_rng(i).integers(0, 256, (one.rows * one.cols, 3072), dtype=np.uint8)
        text = torch.full((one.text_tokens[caption], DIM), i % 128, dtype=torch.bfloat16)
        ids = torch.full((len(text),), i)
        return Sample(one.key, torch.from_numpy(pixels), one.rows, one.cols, ids, text, one.captions[caption])

    def prefetch(self, names: list[str]) -> None:
        self.prefetched = list(names)


def source(name: str, infos: list[SampleInfo], **said: Any) -> Source:
    return Source(name, FakeShards(infos), **said)  # type: ignore[arg-type]


def mixture(infos: list[SampleInfo], **said: Any) -> Mixture:
    """Of one source."""
    return Mixture([source("data", infos)], **said)


def several(count: int, **said: Any) -> list[SampleInfo]:
    return [replace(info(i), **said) for i in range(count)]
