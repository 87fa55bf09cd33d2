"""What is trained on while the clock runs: random images and captions of stated sizes, and their useful work.

    1024x1, 1024x4, 2048x1   1 or 4 square images a step, 160 text tokens each
    1024x5                   the arm `kept` keeps one of five
    mixed                    4 images a step of about 1024² pixels, other ones every step: twelve aspect
                             ratios, captions of 20 to 400 tokens

A step's samples are a pure function of the case and the step's number, so that every arm trains on the
same ones. Useful work counts what no trainer of a LoRA can leave out, and nothing that is recomputed:

    4 W T + 3.5 * 4 S² heads head_dim layers

floating-point operations for T tokens in sequences of S, summed over sequences, with W the weights of all
decoder linears: 2 W T forward, 2 W T for the gradient of their inputs, attention forward (4 S² ...) and
backward (2.5 times that). The lower half of the text's S² that causality saves is counted on purpose, as
in every published figure of this model's trainers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hdl.data.batches import Batch, pack
from hdl.data.buckets import choose_bucket
from hdl.data.order import samples_of_step
from hdl.data.samples import Sample
from hdl.o1.config import O1Config
from hdl.o1.layout import Segment
from hdl.o1.patches import PATCH, PATCH_DIM
from hdl.seeds import generator_for

# Width to height; transposes included.
RATIOS = (
    (1, 1), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2), (21, 9),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`images` a step; `side`: pixels of a square image, or of the square of a mixed image's area;
    `captions`: fewest and most text tokens, boi and tms included."""

    name: str
    images: int
    side: int
    captions: tuple[int, int]
    mixed: bool = False

    def segments(self, step: int) -> list[Segment]:
        """The sizes of a step's samples."""
        fewest, most = self.captions
        if not self.mixed:
            return [Segment(fewest, self.side // PATCH, self.side // PATCH)] * self.images
        texts = torch.randint(
            fewest, most + 1, (self.images,), generator=generator_for("bench captions", step)
        )
        ratios = [RATIOS[i] for i in samples_of_step(len(RATIOS), self.images, seed=0, step=step)]
        grids = [choose_bucket(w * self.side, h * self.side, self.side, True) for w, h in ratios]
        return [Segment(text, rows, cols) for text, (rows, cols) in zip(texts.tolist(), grids)]

    def samples(self, step: int, dim: int) -> list[Sample]:
        """A step's samples with random pixels and random text embeddings [L, dim]."""
        return random_samples(self.segments(step), self.name, step, dim)

    def describe(self) -> str:
        fewest, most = self.captions
        if self.mixed:
            return (
                f"{self.images} images of about {self.side}² px a step in {len(RATIOS)} aspect ratios, "
                f"{fewest} to {most} text tokens"
            )
        return f"{self.images} x {self.side}x{self.side} px a step, {fewest} text tokens"


def random_samples(segments: Sequence[Segment], name: str, step: int, dim: int) -> list[Sample]:
    """Of these sizes, drawn anew for every name and step."""
    generator = generator_for("bench samples", name, step)
    samples = []
    for place, segment in enumerate(segments):
        size = (segment.patches, PATCH_DIM)
        patches = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        text = torch.randn(segment.text, dim, generator=generator) * 0.02
        ids = torch.zeros(segment.text, dtype=torch.int64)
        key = f"{name}-{step}-{place}"
        samples.append(Sample(key, patches, segment.rows, segment.cols, ids, text.to(torch.bfloat16), ""))
    return samples


def all_cases(tiny: bool) -> dict[str, Case]:
    """By name. tiny: the same five with images of a few patches, for a CPU."""
    scale, caption, captions = (16, 10, (4, 12)) if tiny else (1, 160, (20, 400))
    fixed = {
        name: Case(name, images, side // scale, (caption, caption))
        for name, images, side in (
            ("1024x1", 1, 1024),
            ("1024x4", 4, 1024),
            ("1024x5", 5, 1024),
            ("2048x1", 1, 2048),
        )
    }
    return fixed | {"mixed": Case("mixed", 4, 1024 // (scale // 4 or 1), captions, mixed=True)}


def packs(samples: Sequence[Sample], together: bool, pin: bool) -> list[Batch]:
    """A step's batches: all samples in one pack, or (not `together`) one sample a pack. pin: in page-locked
    memory, as the trainer's read-ahead leaves them."""
    places = list(range(len(samples)))
    patches = sum(len(sample.patches) for sample in samples)
    groups = [places] if together else [[place] for place in places]
    return [pack([samples[place] for place in group], group, patches, pin=pin) for group in groups]


def gemm_shapes(config: O1Config) -> list[tuple[int, int]]:
    """(inputs, outputs) of a decoder layer's linears where q, k, v are one and gate, up are one."""
    d, mlp = config.hidden_size, config.intermediate_size
    q_dim, kv_dim = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return [(d, q_dim + 2 * kv_dim), (q_dim, d), (d, 2 * mlp), (mlp, d)]


def decoder_weights(config: O1Config) -> int:
    """W: the number of weights in all decoder linears, 6.946e9 in the 8B model."""
    return config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in gemm_shapes(config))


def useful_flops(config: O1Config, segments: Sequence[Segment]) -> float:
    """Floating-point operations of one training step on these samples that nobody can leave out."""
    tokens = sum(segment.tokens for segment in segments)
    pairs = sum(segment.tokens**2 for segment in segments)
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 4.0 * decoder_weights(config) * tokens + 3.5 * 4.0 * pairs * heads
