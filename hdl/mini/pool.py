"""All the scenes of a pretraining run, drawn beforehand on every core and sorted by caption length.

Batches whose captions all have the same number of tokens go through attention as one dense batch, so a batch is
drawn from one length at a time, each length as often as its share of the scenes.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from hdl.mini.captions import loose_caption
from hdl.mini.scenes import Scene, imagine, paint
from hdl.mini.shapes import CANVAS
from hdl.mini.tokenizer import chat_ids

CHUNK = 500  # scenes a process draws before it hands them over


@dataclass(frozen=True)
class Pool:
    """N scenes on one device."""

    pictures: Tensor  # uint8 [N, 128, 128, 3]
    scenes_by_length: dict[int, Tensor]  # L -> int64 [n]: scenes whose caption has L tokens
    ids_by_length: dict[int, Tensor]  # L -> int64 [n, L]

    def lengths(self, at_least: int) -> dict[int, float]:
        """Caption lengths that at least so many scenes share, and the share of each among those."""
        counts = {
            length: len(scenes) for length, scenes in self.scenes_by_length.items() if len(scenes) >= at_least
        }
        return {length: count / sum(counts.values()) for length, count in sorted(counts.items())}

    def draw(self, length: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` random scenes of one caption length: uint8 [count, 128, 128, 3], token ids [count, L]."""
        scenes = self.scenes_by_length[length]
        chosen = torch.randint(len(scenes), (count,), device=scenes.device)
        return self.pictures[scenes[chosen]], self.ids_by_length[length][chosen]

    def to(self, device: torch.device | str) -> "Pool":
        by_length = [
            {length: rows.to(device) for length, rows in table.items()}
            for table in (self.scenes_by_length, self.ids_by_length)
        ]
        return Pool(self.pictures.to(device), *by_length)


def training_captions(count: int, seed: int) -> Iterator[str]:
    """Captions like those of the pool, for a tokenizer to learn from."""
    rng = np.random.default_rng(seed)
    return (loose_caption(imagine(rng), rng) for _ in range(count))


def draw_pool(count: int, tokenizer: Tokenizer, seed: int) -> Pool:
    """Draws `count` scenes in host memory; the same count and seed give the same scenes on any number of cores.

    To be called before anything touches a GPU: the drawing processes are forks of this one.
    """
    starts = range(0, count, CHUNK)
    jobs = [(tokenizer, seed, start, min(CHUNK, count - start)) for start in starts]
    pictures = torch.empty(count, CANVAS, CANVAS, 3, dtype=torch.uint8)
    ids: list[list[int]] = []
    with get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1)) as workers:
        drawn = tqdm(
            workers.imap(_draw_chunk, jobs), total=len(jobs), desc=f"{CHUNK} scenes each", mininterval=5
        )
        for start, (chunk, rows) in zip(starts, drawn, strict=True):
            pictures[start : start + len(chunk)] = torch.from_numpy(chunk)
            ids += rows
    lengths = np.array([len(row) for row in ids])
    members = {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}
    scenes_by_length = {length: torch.from_numpy(scenes) for length, scenes in members.items()}
    ids_by_length = {
        length: torch.tensor([ids[scene] for scene in scenes]) for length, scenes in members.items()
    }
    return Pool(pictures, scenes_by_length, ids_by_length)


def _draw_chunk(job: tuple[Tokenizer, int, int, int]) -> tuple[np.ndarray, list[list[int]]]:
    tokenizer, seed, start, count = job
    rng = np.random.default_rng([seed, start])
    scenes = [imagine(rng) for _ in range(count)]
    return np.stack([paint(scene) for scene in scenes]), [
        _caption_ids(tokenizer, scene, rng) for scene in scenes
    ]


def _caption_ids(tokenizer: Tokenizer, scene: Scene, rng: np.random.Generator) -> list[int]:
    """A caption of an even number of tokens if one is found soon: fewer lengths are fewer kernels to prepare."""
    for _ in range(8):
        ids = chat_ids(tokenizer, loose_caption(scene, rng))
        if len(ids) % 2 == 0:
            break
    return ids
