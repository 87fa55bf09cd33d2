"""A DoRA apart from its model: read, written, drawn with, and refused where it has no meaning."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hdl.adapter.formats import read_adapter_file, write_adapter_file
from hdl.adapter.into_checkpoint import merge_into_checkpoint
from hdl.adapter.lora import adapter_parameters, attach, load_adapter, open_adapter, save_adapter, shape_of
from hdl.adapter.merge import Part, merge_by_sum
from hdl.adapter.stack import attach_adapters, set_adapters
from hdl.config import Lora
from hdl.errors import HdlError
from hdl.kernels.fuse import cannot_fuse
from hdl.o1.checkpoint import open_checkpoint
from hdl.sample.path import DecoderPath, PathOptions, choose_path
from tests.adapter.test_lora import INPUTS, base

DORA = Lora(rank=4, alpha=8, dora=True)


@pytest.fixture
def trained(tiny_base: Path) -> PeftModel:
    adapted = attach(base(tiny_base), DORA, str(tiny_base), seed=0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(adapted).items():
            if "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return adapted


@pytest.fixture
def saved(trained: PeftModel, tmp_path: Path) -> Path:
    save_adapter(trained, adapter_parameters(trained), tmp_path / "dora")
    return tmp_path / "dora"


def test_it_starts_as_nothing_and_is_the_papers_formula(tiny_base: Path, trained: PeftModel) -> None:
    with torch.no_grad():
        fresh = attach(base(tiny_base), DORA, str(tiny_base), seed=0)
        torch.testing.assert_close(fresh(*INPUTS), base(tiny_base)(*INPUTS), rtol=1e-4, atol=1e-4)
        layer = trained.base_model.model.model.language_model.layers[1].mlp.up_proj
        x = torch.randn(5, 64)
        changed = (
            layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        norms = layer.lora_magnitude_vector["default"].weight / changed.norm(dim=1)
        torch.testing.assert_close(layer(x), x @ (norms[:, None] * changed).t(), rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in adapter_parameters(trained).values())
    assert "lora.dora" in str(cannot_fuse(trained))


def test_it_draws_as_it_did_however_it_is_opened(trained: PeftModel, saved: Path, tiny_base: Path) -> None:
    with torch.no_grad():
        expected = trained(*INPUTS)
        assert torch.equal(open_adapter(base(tiny_base), saved)(*INPUTS), expected)
        write_adapter_file(read_adapter_file(saved), saved.parent / "again", "peft")
        drawn = attach_adapters(base(tiny_base), {"one": read_adapter_file(saved.parent / "again")})
        assert torch.equal(drawn(*INPUTS), base(tiny_base)(*INPUTS))
        set_adapters(drawn, {"one": 1.0})
        assert torch.equal(drawn(*INPUTS), expected)
    lora = attach(base(tiny_base), Lora(rank=4, alpha=8), "", seed=0)
    with pytest.raises(HdlError, match=r"another shape: .*lora_magnitude_vector is .*dora it was made with"):
        load_adapter(lora, saved)
    assert shape_of(DORA) != shape_of(Lora(rank=4, alpha=8))


def test_only_peft_has_a_format_for_it_and_nothing_merges_it(
    saved: Path, tiny_base: Path, tmp_path: Path
) -> None:
    dora, checkpoint = read_adapter_file(saved), open_checkpoint(tiny_base)
    for format in ("comfyui", "kohya"):
        with pytest.raises(HdlError, match="is a DoRA, which is written in PEFT's format alone"):
            write_adapter_file(dora, tmp_path / "x.safetensors", format)
    parts = [Part("d", dora, 1.0)]
    with pytest.raises(HdlError, match="d is a DoRA, whose change is no B A"):
        merge_by_sum(parts)
    with pytest.raises(HdlError, match="d is a DoRA"):
        merge_into_checkpoint(tmp_path / "merged", checkpoint, parts, "bf16", "cpu")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "x.safetensors").exists()
    stacked = attach_adapters(base(tiny_base), {"one": dora, "two": dora})
    with pytest.raises(
        HdlError, match="adapter one is a DoRA, which is on alone or not at all; found one, two"
    ):
        set_adapters(stacked, {"one": 1.0, "two": 1.0})


def test_a_file_that_has_some_of_it_is_named(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    some = dict(tensors)
    name = next(n for n in tensors if n.endswith("lora_magnitude_vector"))
    save_file({n: t for n, t in some.items() if n != name}, file)
    with pytest.raises(HdlError, match="of 27 modules, expected 28 of 28: .* use_dora True"):
        read_adapter_file(saved)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    with pytest.raises(HdlError, match=r"DoRA's magnitude of .* is \[\d+\], expected \[\d+\]"):
        read_adapter_file(saved)


def test_drawing_with_it_takes_the_plain_path(tiny_base: Path) -> None:
    config, gpu = open_checkpoint(tiny_base).config, torch.device("cuda")
    chosen = choose_path(PathOptions(), config, gpu, torch.bfloat16, dora=True)
    assert not chosen.fused and "an adapter is a DoRA" in chosen.notices[0]
    asked = choose_path(PathOptions(kernels="plain"), config, gpu, torch.bfloat16, dora=True)
    assert asked == DecoderPath(False, "full")
    with pytest.raises(HdlError, match="kernels fused: an adapter is a DoRA.*use kernels auto"):
        choose_path(PathOptions(kernels="fused"), config, gpu, torch.bfloat16, dora=True)
    with pytest.raises(HdlError, match="weights fp8 needs the fused path, but an adapter is a DoRA"):
        choose_path(PathOptions(weights="fp8"), config, gpu, torch.bfloat16, dora=True)
