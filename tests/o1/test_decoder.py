import json
from pathlib import Path

import pytest
import torch

from hdl.o1.checkpoint import TOKEN_TABLE, expected_shapes, load_model, open_checkpoint
from hdl.o1.config import read_config
from hdl.o1.decoder import rotary_angles
from hdl.o1.layout import Segment, lay_out
from hdl.o1.prompt import PromptEncoder

HERE = Path(__file__).parent


def test_names_and_shapes_are_those_of_the_real_8b_checkpoint() -> None:
    real = {
        name: tuple(shape) for name, shape in json.loads((HERE / "o1-8b-tensors.json").read_text()).items()
    }
    ours = expected_shapes(read_config(HERE / "o1-8b-config.json"))
    unused = {name for name in real if name.startswith(("model.visual.", "lm_head."))}
    assert ours == {name: shape for name, shape in real.items() if name not in unused}
    parameters = sum(torch.Size(shape).numel() for name, shape in ours.items() if name != TOKEN_TABLE)
    assert 6.94e9 < parameters < 7.05e9


def test_each_rotary_frequency_turns_with_its_own_axis() -> None:
    """On the real config: 24/20/20 of 64 frequencies, interleaved t h w t h w ..., the last four again t."""
    config = read_config(HERE / "o1-8b-config.json")
    t, h, w = 3.0, 50.0, 700.0
    angles = rotary_angles(torch.tensor([[t], [h], [w]]), config)[0].double()
    axes = [t, h, w] * 20 + [t] * 4
    for i, position in enumerate(axes):
        assert float(angles[i]) == pytest.approx(position * 5e6 ** (-2 * i / 128), rel=1e-5), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pack_equals_its_samples_one_by_one(tiny_base: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(tiny_base)
    model, encoder = load_model(checkpoint, "cpu", dtype), PromptEncoder(checkpoint)
    prompts = ["a cat", "a long caption about a boat on a calm sea " * 3, "a dog", " "]
    texts = [encoder.embed(encoder.ids(prompt)) for prompt in prompts]
    segments = [Segment(len(t), r, c) for t, (r, c) in zip(texts, [(2, 3), (1, 1), (2, 3), (4, 1)])]
    t = torch.tensor([0.1, 0.5, 0.9, 0.3])
    z = [torch.randn(s.patches, 3072, dtype=dtype) * 4 for s in segments]
    with torch.no_grad():
        packed = model(torch.cat(texts), torch.cat(z), t, lay_out(segments)).split(
            [s.patches for s in segments]
        )
        alone = [
            model(text, patches, t[i : i + 1], lay_out([segment]))
            for i, (text, patches, segment) in enumerate(zip(texts, z, segments))
        ]
    for one, other in zip(packed, alone):
        error = (one - other).norm() / other.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-14), float(error)
