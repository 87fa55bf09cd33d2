"""What is known of all samples without reading them, as numpy columns: millions of them, gone through once at the
start, and chosen from and counted without a Python object each."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hdl.data.samples import SampleInfo

HASHED = 13  # hexadecimal digits of a hash that a float holds exactly


@dataclass(frozen=True)
class Columns:
    """n samples of all sources, one source after another."""

    source: np.ndarray  # int32 [n]: number of the source
    rows: np.ndarray  # int32 [n]: patches
    cols: np.ndarray  # int32 [n]: patches
    mirrored: np.ndarray  # bool [n]: may be mirrored
    references: np.ndarray  # int32 [n]: patches of its references; 0: it is no pair
    empty_text: np.ndarray  # int32 [n]: tokens of its own empty prompt; 0: it has none
    image: np.ndarray  # float64 [n]: the image file's hash, as a number in [0, 1)
    shard: np.ndarray  # int32 [n]: number of the shard in `shards`
    captions: np.ndarray  # int32 [n]: how many it has
    shards: list[tuple[int, str]]  # source, file name
    tags: dict[str, np.ndarray]  # int32: the samples with this tag or style, ascending
    texts: np.ndarray  # int32: tokens of every caption of every sample
    first_text: np.ndarray  # int64 [n]: where a sample's begin

    @classmethod
    def of(cls, sources: Sequence[Iterable[SampleInfo]]) -> "Columns":
        """Goes through each source's samples once."""
        columns = [array("i") for _ in range(8)]
        source, rows, cols, mirrored, references, empty_text, shard, captions = columns
        image, texts = array("d"), array("i")
        shards: dict[tuple[int, str], int] = {}
        tags: dict[str, array[int]] = {}
        for number, infos in enumerate(sources):
            for info in infos:
                for tag in {*info.tags, info.style} - {None}:
                    tags.setdefault(str(tag), array("i")).append(len(source))
                source.append(number)
                rows.append(info.rows)
                cols.append(info.cols)
                mirrored.append(info.mirrored)
                references.append(info.reference_patches)
                empty_text.append(info.empty_tokens)
                shard.append(shards.setdefault((number, info.shard), len(shards)))
                captions.append(len(info.text_tokens))
                image.append(int(info.image_sha256[:HASHED], 16) / 16**HASHED)
                texts.extend(info.text_tokens)
        counts = np.asarray(captions, dtype=np.int64)
        return cls(
            source=np.asarray(source), rows=np.asarray(rows), cols=np.asarray(cols),
            mirrored=np.asarray(mirrored, dtype=bool),
            references=np.asarray(references), empty_text=np.asarray(empty_text),
            image=np.asarray(image), shard=np.asarray(shard), captions=np.asarray(captions), shards=list(shards),
            tags={tag: np.asarray(samples) for tag, samples in tags.items()},
            texts=np.asarray(texts), first_text=np.cumsum(counts) - counts,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def text_tokens(self, sample: np.ndarray, caption: np.ndarray) -> np.ndarray:
        """int32: tokens of these captions of these samples."""
        return self.texts[self.first_text[sample] + caption]

    def longest_text(self) -> np.ndarray:
        """int32 [n]: tokens of each sample's longest caption, or of its own empty prompt."""
        if not len(self):
            return self.texts
        return np.maximum(np.maximum.reduceat(self.texts, self.first_text), self.empty_text)

    def patches(self, sample: np.ndarray) -> np.ndarray:
        """int32: of these samples' pictures."""
        return self.rows[sample] * self.cols[sample]
