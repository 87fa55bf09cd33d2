"""The adapter is PEFT's, and PEFT loads it onto the published model's own class."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from hdl.adapter.formats import read_adapter_file, write_adapter_file
from hdl.adapter.lora import (
    Switch,
    adapter_parameters,
    attach,
    load_adapter,
    open_adapter,
    save_adapter,
    shape_of,
    sizes_of,
)
from hdl.adapter.metadata import ALPHA, RANK
from hdl.adapter.stack import attach_adapters, set_adapters
from hdl.config import Lora
from hdl.errors import HdlError
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.decoder import O1
from hdl.o1.layout import Segment, lay_out

INPUTS = (torch.randn(6, 64), torch.randn(4, 3072), torch.tensor([0.5]), lay_out([Segment(6, 2, 2)]))


def base(folder: Path) -> O1:
    return load_model(open_checkpoint(folder), "cpu", torch.float32)


@pytest.fixture
def trained(tiny_base: Path) -> PeftModel:
    """An adapter whose B is not zero any more."""
    adapted = attach(base(tiny_base), Lora(rank=4, alpha=8), str(tiny_base), seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return adapted


def test_the_default_targets_are_the_seven_linears_of_every_layer(tiny_base: Path) -> None:
    adapted = attach(base(tiny_base), Lora(), str(tiny_base), seed=0)
    names = adapter_parameters(adapted)
    assert len(names) == 4 * 7 * 2
    assert all(".language_model.layers." in name for name in names)
    with torch.no_grad():
        assert torch.equal(adapted(*INPUTS), base(tiny_base)(*INPUTS))  # B starts at zero


def test_ranks_start_from_the_same_a_and_seeds_differ(tiny_base: Path) -> None:
    def first_a(seed: int) -> torch.Tensor:
        return next(iter(adapter_parameters(attach(base(tiny_base), Lora(), "", seed)).values()))

    assert torch.equal(first_a(1), first_a(1))
    assert not torch.equal(first_a(1), first_a(2))


def test_a_saved_adapter_draws_as_it_did(trained: PeftModel, tiny_base: Path, tmp_path: Path) -> None:
    save_adapter(trained, adapter_parameters(trained), tmp_path)
    again = open_adapter(base(tiny_base), tmp_path)
    with torch.no_grad():
        expected = trained(*INPUTS)
        assert torch.equal(again(*INPUTS), expected)
        assert not torch.allclose(base(tiny_base)(*INPUTS), expected)
        with again.disable_adapter():
            assert torch.equal(again(*INPUTS), base(tiny_base)(*INPUTS))


def test_peft_loads_it_onto_the_published_models_class(
    trained: PeftModel, tiny_base: Path, tmp_path: Path
) -> None:
    save_adapter(trained, adapter_parameters(trained), tmp_path)
    config = Qwen3VLConfig.from_pretrained(tiny_base)
    published = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration(config), str(tmp_path))
    theirs = {name: p for name, p in published.named_parameters() if "lora_" in name}
    ours = adapter_parameters(trained)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_rslora_scales_by_the_root_of_the_rank(tiny_base: Path) -> None:
    for rslora, scale in ((False, 8 / 16), (True, 8 / 4)):
        adapted = attach(base(tiny_base), Lora(rank=16, alpha=8, rslora=rslora), "", seed=0)
        layer = adapted.base_model.model.model.language_model.layers[0].mlp.up_proj
        assert layer.scaling["default"] == pytest.approx(scale)


def test_an_adapter_of_another_rank_is_refused(trained: PeftModel, tiny_base: Path, tmp_path: Path) -> None:
    save_adapter(trained, adapter_parameters(trained), tmp_path)
    other = attach(base(tiny_base), Lora(rank=8), "", seed=0)
    with pytest.raises(HdlError, match=r"another shape: .*lora_A.weight is \[4, "):
        load_adapter(other, tmp_path)


def test_targets_that_fit_nothing_are_named(tiny_base: Path) -> None:
    with pytest.raises(HdlError, match="lora.targets 'nonsense' fits no linear"):
        attach(base(tiny_base), Lora(targets="nonsense"), "", seed=0)


def test_a_folder_without_an_adapter_is_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(HdlError, match=r"no readable adapter_config.json"):
        open_adapter(base(tiny_base), tmp_path)


PATTERNS = {
    "rank_pattern": {r"layers\.[01]\..*q_proj": 8, "mlp.up_proj": 2},
    "alpha_pattern": {"mlp.up_proj": 3.0},
}


def test_ranks_and_alphas_by_layer_are_pefts(tiny_base: Path, tmp_path: Path) -> None:
    adapted = attach(base(tiny_base), Lora(rank=4, alpha=8, **PATTERNS), str(tiny_base), seed=0)
    layers = adapted.base_model.model.model.language_model.layers
    assert [len(layer.self_attn.q_proj.lora_A["default"].weight) for layer in layers] == [8, 8, 4, 4]
    assert [layer.mlp.up_proj.scaling["default"] for layer in layers] == [3 / 2] * 4
    assert layers[0].self_attn.q_proj.scaling["default"] == 1.0
    assert sizes_of(adapted) == {RANK: "Dynamic", ALPHA: "Dynamic", "format": "pt"}
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
        save_adapter(adapted, adapter_parameters(adapted), tmp_path / "peft")
        expected = adapted(*INPUTS)
        assert torch.equal(open_adapter(base(tiny_base), tmp_path / "peft")(*INPUTS), expected)
        for format in ("peft", "comfyui", "kohya"):  # and as tools/convert.py and tools/sample.py have it
            out = tmp_path / ("again" if format == "peft" else f"{format}.safetensors")
            write_adapter_file(read_adapter_file(tmp_path / "peft"), out, format)
            drawn = attach_adapters(base(tiny_base), {"a": read_adapter_file(out)})
            set_adapters(drawn, {"a": 1.0})
            assert torch.equal(drawn(*INPUTS), expected)


def test_an_adapter_of_other_patterns_is_refused(trained: PeftModel, tiny_base: Path, tmp_path: Path) -> None:
    save_adapter(trained, adapter_parameters(trained), tmp_path)
    other = Lora(rank=4, rank_pattern={"q_proj": 8})
    with pytest.raises(HdlError, match=r"another shape: .*q_proj.lora_A.weight is \[4, .*rank_pattern"):
        load_adapter(attach(base(tiny_base), other, "", seed=0), tmp_path)
    assert shape_of(other) != shape_of(Lora(rank=4))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            {"rank_pattern": {"qproj": 8}},
            r"lora\.rank_pattern 'qproj': it matches no adapted linear; names end as",
        ),
        (
            {"alpha_pattern": {"x_embedder.proj1": 8}},
            r"lora\.alpha_pattern 'x_embedder\.proj1': it matches no",
        ),
        (
            {"rank_pattern": {r".*": 8, "q_proj": 2}},
            r"'q_proj': every adapted .* by a key before it \(\.\*\)",
        ),
    ],
)
def test_a_pattern_that_decides_nothing_is_named(pattern: dict, message: str, tiny_base: Path) -> None:
    with pytest.raises(HdlError, match=message):
        attach(base(tiny_base), Lora(**pattern), "", seed=0)


def test_a_switch_is_pefts_own_without_its_freezing(trained: PeftModel) -> None:
    switch, on = Switch(trained), trained(*INPUTS)
    with trained.disable_adapter():
        wanted = trained(*INPUTS)
    with switch.off() as base_of_it:
        assert base_of_it(*INPUTS).equal(wanted) and not wanted.equal(on)
        assert all(p.requires_grad for p in adapter_parameters(trained).values())
    assert trained(*INPUTS).equal(on)
    with pytest.raises(RuntimeError, match="torn"), switch.off():
        raise RuntimeError("torn")
    assert trained(*INPUTS).equal(on)
