"""Files that other tools write and read: each is read, written and read again as the same adapter."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from hdl.adapter.formats import WRITTEN, check_fits, read_adapter_file, write_adapter_file
from hdl.adapter.lora import adapter_parameters, attach, save_adapter
from hdl.adapter.metadata import ALPHA, BASE, RANK, TRIGGER, describe
from hdl.adapter.names import Format, _by_underscored, _modules, key_of, linears, parse_key
from hdl.config import Lora
from hdl.errors import HdlError
from hdl.o1.checkpoint import Checkpoint, load_model, open_checkpoint
from tests.adapter.adapters import made_up, same

O_PROJ = "model.language_model.layers.3.self_attn.o_proj"


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint(Path(__file__).parents[1] / "golden" / "o1-tiny")


def output(folder: Path, format: Format) -> Path:
    return folder / (format if format == "peft" else f"{format}.safetensors")


def test_no_two_linears_are_spelt_alike_with_underscores(base: Checkpoint) -> None:
    assert len(_by_underscored()) == len(_modules())
    assert set(linears(base)) < _modules()
    assert {module.removeprefix("model.visual.").split(".")[0] for module in linears(base)} > {
        "blocks",
        "merger",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", WRITTEN)
def test_any_way_round_the_formats_it_is_the_same_to_the_bit(
    base: Checkpoint, tmp_path: Path, start: Format, rslora: bool, dtype: torch.dtype
) -> None:
    adapter = made_up(base, dtype=dtype, only="model.", rslora=rslora, odd=True, note="kept")
    write_adapter_file(adapter, output(tmp_path, start), start)
    first = read_adapter_file(output(tmp_path, start))
    assert same(first, adapter) and first.format == start and first.metadata["note"] == "kept"
    for i, format in enumerate(WRITTEN):
        there, back = output(tmp_path / f"{i}", format), output(tmp_path / f"{i}-back", start)
        write_adapter_file(first, there, format)
        assert same(read_adapter_file(there), adapter)
        write_adapter_file(read_adapter_file(there), back, start)
        files = [output(tmp_path, start), back]
        if start == "peft":
            assert len({(f / "adapter_config.json").read_text() for f in files}) == 1
            files = [f / "adapter_model.safetensors" for f in files]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_each_format_has_the_names_and_the_scale_of_its_tools(base: Checkpoint, tmp_path: Path) -> None:
    """The names as ComfyUI's and musubi-tuner's sources have them, and alpha / rank, which both compute."""
    adapter = made_up(base, rank=4, alpha=8.0, rslora=True)
    for format in ("comfyui", "kohya"):
        write_adapter_file(adapter, output(tmp_path, format), format)
    comfy, kohya = (load_file(output(tmp_path, f)) for f in ("comfyui", "kohya"))
    c = "diffusion_model.language_model.layers.3.self_attn.o_proj"
    k = "lora_unet_model_language_model_layers_3_self_attn_o_proj"
    pair = adapter.pairs[O_PROJ]
    for tensors, a, b, alpha in (
        (comfy, f"{c}.lora_A.weight", f"{c}.lora_B.weight", f"{c}.alpha"),
        (kohya, f"{k}.lora_down.weight", f"{k}.lora_up.weight", f"{k}.alpha"),
    ):
        assert torch.equal(tensors[a], pair.a) and torch.equal(tensors[b], pair.b)
        assert len(tensors) == 3 * len(adapter.pairs)
        assert float(tensors[alpha]) / len(tensors[a]) == pytest.approx(8.0 / math.sqrt(4))


def test_peft_itself_computes_the_same_from_what_is_written(base: Checkpoint, tmp_path: Path) -> None:
    adapter = made_up(base, rslora=True, odd=True)
    write_adapter_file(adapter, tmp_path / "a.safetensors", "kohya")
    write_adapter_file(read_adapter_file(tmp_path / "a.safetensors"), tmp_path / "peft", "peft")
    config = Qwen3VLConfig.from_pretrained(base.folder)
    model = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration(config), str(tmp_path / "peft"))
    for module, pair in adapter.pairs.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(delta, adapter.scale(module) * pair.b @ pair.a)


@pytest.mark.parametrize(
    "spelt",
    [
        "diffusion_model.model.language_model.layers.3.self_attn.o_proj.lora_A.weight",  # ai-toolkit
        "diffusion_model.language_model.layers.3.self_attn.o_proj.lora_down.weight",
        "model.language_model.layers.3.self_attn.o_proj.lora_A.default.weight",  # DiffSynth
        "lora_unet_language_model_layers_3_self_attn_o_proj.lora_down.weight",  # ComfyUI's own underscored name
    ],
)
def test_other_spellings_in_the_wild_are_read(spelt: str) -> None:
    found = parse_key(spelt)
    assert found and found[1:] == (O_PROJ, "A")


def test_without_alpha_the_scale_is_one(base: Checkpoint, tmp_path: Path) -> None:
    """As ComfyUI and musubi-tuner take it."""
    adapter = made_up(base, rank=4)
    write_adapter_file(adapter, tmp_path / "a.safetensors", "comfyui")
    tensors = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if not k.endswith(".alpha")}
    save_file(tensors, tmp_path / "b.safetensors")
    assert read_adapter_file(tmp_path / "b.safetensors").scale(O_PROJ) == 1.0


def test_an_alpha_that_another_tool_changed_counts(base: Checkpoint, tmp_path: Path) -> None:
    write_adapter_file(made_up(base, rank=4, alpha=8, rslora=True), tmp_path / "a.safetensors", "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    halved = {k: v / 2 if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(halved, tmp_path / "b.safetensors", {"hdl.rslora": '{"lora_alpha": 8, "alpha_pattern": {}}'})
    assert read_adapter_file(tmp_path / "b.safetensors").scale(O_PROJ) == pytest.approx(8 / math.sqrt(4) / 2)


def test_what_the_trainer_saves_says_what_it_is(base: Checkpoint, tiny_base: Path, tmp_path: Path) -> None:
    model = attach(load_model(base, "cpu", torch.float32), Lora(rank=4, alpha=8), str(tiny_base), seed=0)
    about = describe(
        title="kotonia",
        base=base.fingerprint(),
        dataset="d4",
        steps=7,
        trigger="kotonia style",
        license="CC0",
    )
    save_adapter(model, adapter_parameters(model), tmp_path / "adapter", about)
    found = read_adapter_file(tmp_path / "adapter")
    assert found.metadata | {"format": "pt"} == found.metadata | about | {RANK: "4", ALPHA: "8"}
    assert found.metadata[TRIGGER] == "kotonia style" and check_fits(found, base, "it") is None
    assert not any("date" in name for name in found.metadata)  # the same run writes the same bytes
    write_adapter_file(found, tmp_path / "a.safetensors", "kohya")
    assert read_adapter_file(tmp_path / "a.safetensors").metadata == found.metadata


def broken(base: Checkpoint, tmp_path: Path, how: str) -> Path:
    """A kohya file with one thing wrong."""
    file = tmp_path / f"{how}.safetensors"
    adapter = made_up(base)
    write_adapter_file(adapter, tmp_path / "good.safetensors", "kohya")
    tensors = load_file(tmp_path / "good.safetensors")
    a, b, alpha = (key_of(O_PROJ, part, "kohya") for part in ("A", "B", "alpha"))
    if how == "half":
        del tensors[b]
    elif how == "unknown":
        tensors |= {f"lora_te_text_model_{i}.lora_up.weight": torch.zeros(1) for i in range(11)}
    elif how == "mixed":
        tensors[key_of("model.final_layer2.linear", "A", "comfyui")] = torch.zeros(4, 64)
    elif how == "twice":
        tensors[a.replace("model_language", "language")] = tensors[a].clone()
    elif how == "nan":
        tensors[a][1, 2] = math.nan
    elif how == "inf":
        tensors[b] = (tensors[b] * 1e6).half()
    elif how == "ranks":
        tensors[b] = tensors[b][:, :3].contiguous()
    elif how == "alpha":
        tensors[alpha] = torch.zeros(())
    elif how == "integers":
        tensors[a] = tensors[a].int()
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("half", rf"halves .*{O_PROJ} \(B is missing\)"),
        ("unknown", r"lora_te_text_model_0\.lora_up\.weight.* and 3 more"),
        (
            "mixed",
            r"mixes formats: .*kohya: lora_unet_.*comfyui: diffusion_model|mixes formats: .*comfyui: .*kohya: ",
        ),
        ("twice", rf"holds A of {O_PROJ} twice"),
        ("nan", r"self_attn_o_proj\.lora_down\.weight holds 1 numbers that are not finite"),
        ("inf", r"o_proj\.lora_up\.weight holds \d+ numbers that are not finite in float16"),
        ("ranks", rf"{O_PROJ} do not belong together: A is \[4, 64\].*B is \[64, 3\]"),
        ("alpha", rf"alpha of {O_PROJ} is not a finite number above 0"),
        ("integers", r"is int32, expected floating-point"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    base: Checkpoint, tmp_path: Path, how: str, says: str
) -> None:
    with pytest.raises(HdlError, match=says):
        read_adapter_file(broken(base, tmp_path, how))


class Bomb:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path("/tmp/hdl-was-unpickled").touch, ())


@pytest.mark.parametrize("protocol", ["torch", 2, 5])
@pytest.mark.parametrize("name", ["adapter_model.bin", "a.pt", "a.safetensors"])
def test_a_pickle_is_refused_whatever_it_is_called(tmp_path: Path, name: str, protocol: str | int) -> None:
    import pickle

    file = tmp_path / name
    if protocol == "torch":
        torch.save({"a": Bomb()}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(), protocol=int(protocol)))
    Path("/tmp/hdl-was-unpickled").unlink(missing_ok=True)
    with pytest.raises(HdlError, match="is a pickle"):
        read_adapter_file(file)
    assert not Path("/tmp/hdl-was-unpickled").exists()


def test_what_is_no_adapter_is_named(tmp_path: Path, base: Checkpoint) -> None:
    (tmp_path / "text.safetensors").write_text("not one")
    for path, says in (
        (tmp_path / "nowhere", "no such adapter"),
        (tmp_path / "text.safetensors", "not readable as safetensors"),
        (base.folder, r"expected adapter_model.safetensors or exactly one .safetensors file, found 5"),
    ):
        with pytest.raises(HdlError, match=says):
            read_adapter_file(path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(HdlError, match="adapter_model.bin may be pickles, which hdl never reads"):
        read_adapter_file(tmp_path / "old")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("peft_type", "LOHA", "only LoRA and DoRA are read, found LOHA"),
        ("use_dora", True, r"lora_magnitude_vector of 0 modules, expected 28 of 28: .* use_dora True"),
        ("r", 3, r"has rank 4, adapter_config.json says 3"),
        ("lora_alpha", "much", "not the config of a PEFT LoRA"),
    ],
)
def test_a_peft_config_that_does_not_suit_is_named(
    base: Checkpoint, tmp_path: Path, field: str, value: object, says: str
) -> None:
    write_adapter_file(made_up(base), tmp_path / "a", "peft")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(HdlError, match=says):
        read_adapter_file(tmp_path / "a")
    file.unlink()
    with pytest.raises(HdlError, match=r"adapter_config.json: not the config"):
        read_adapter_file(tmp_path / "a")


def test_an_adapter_must_fit_its_base(base: Checkpoint) -> None:
    unsure = made_up(base)
    notice = check_fits(unsure, base, "x.safetensors")
    assert notice and "x.safetensors does not say which base" in notice
    with pytest.raises(HdlError, match=r"trained on another base: it names sha256:1, .* is sha256:"):
        check_fits(replace(unsure, metadata={BASE: "sha256:1"}), base, "x")
    pair = unsure.pairs[O_PROJ]
    wide = replace(unsure, pairs={O_PROJ: replace(pair, a=torch.zeros(4, 65))})
    with pytest.raises(HdlError, match=rf"{O_PROJ} is \[64, 65\], expected \[64, 64\]"):
        check_fits(wide, base, "x")
    deep = replace(unsure, pairs={O_PROJ.replace("3", "9"): pair})
    with pytest.raises(HdlError, match=r"layers.9.self_attn.o_proj, which the base lacks"):
        check_fits(deep, base, "x")


def test_nothing_is_overwritten_and_nothing_half_written_stays(base: Checkpoint, tmp_path: Path) -> None:
    adapter = made_up(base)
    write_adapter_file(adapter, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(HdlError, match="already there"):
        write_adapter_file(adapter, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(HdlError, match=r"is a \.safetensors file"):
        write_adapter_file(adapter, tmp_path / "b", "kohya")
    with pytest.raises(HdlError, match="is a folder"):
        write_adapter_file(adapter, tmp_path / "b.safetensors", "peft")
    huge = replace(adapter, pairs={O_PROJ: replace(adapter.pairs[O_PROJ], b=torch.full((64, 4), 1e5))})
    with pytest.raises(HdlError, match=r"not finite in float16"):
        write_adapter_file(huge, tmp_path / "c.safetensors", "kohya", torch.float16)
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]
