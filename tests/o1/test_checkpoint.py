"""Both forms of a checkpoint give the same model, and a spoiled one is named before a weight is read."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hdl.adapter.formats import read_adapter_file
from hdl.adapter.into_checkpoint import merge_into_checkpoint
from hdl.adapter.lora import adapter_parameters, attach, save_adapter
from hdl.adapter.merge import Part
from hdl.config import Lora
from hdl.errors import HdlError
from hdl.memory.absent import bring_in
from hdl.o1.checkpoint import TOKEN_TABLE, Checkpoint, expected_shapes, load_model, open_checkpoint
from hdl.o1.prompt import PromptEncoder

Tensors = dict[str, torch.Tensor]
NORM = "model.language_model.norm.weight"


def all_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def single_file(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny checkpoint as one file, as ComfyUI users have it, after `change`."""

    def write(prefix: str = "", change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
        tensors = {
            prefix + name.removeprefix("model."): tensor
            for name, tensor in all_tensors(tiny_base).items()
            if not name.startswith("lm_head") and "deepstack_merger_list" not in name
        }
        change(tensors)
        path = tmp_path / "single.safetensors"
        save_file(tensors, path)
        return path

    return write


def states_equal(one: Checkpoint, other: Checkpoint) -> bool:
    first, second = (load_model(c, "cpu", torch.float32).state_dict() for c in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_the_single_file_is_the_published_folder(
    single_file: Callable[..., Path], tiny_base: Path, prefix: str
) -> None:
    folder, single = open_checkpoint(tiny_base), open_checkpoint(single_file(prefix), config_from=tiny_base)
    assert states_equal(folder, single)
    assert folder.fingerprint() == single.fingerprint()


def test_a_folder_with_one_file_needs_no_index(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    save_file(all_tensors(tiny_base), tmp_path / "model.safetensors")
    assert states_equal(open_checkpoint(tiny_base), open_checkpoint(tmp_path))


def test_weights_are_the_files_bit_for_bit(tiny_base: Path) -> None:
    model, stored = load_model(open_checkpoint(tiny_base), "cpu", torch.bfloat16), all_tensors(tiny_base)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, stored[name]), name
    assert not any(p.requires_grad for p in model.parameters())


def test_token_rows_are_the_tables(tiny_base: Path) -> None:
    rows = open_checkpoint(tiny_base).token_rows([5, 0, 5, 575])
    assert torch.equal(rows, all_tensors(tiny_base)[TOKEN_TABLE][[5, 0, 5, 575]])


def test_the_fingerprint_is_the_tables(single_file: Callable[..., Path], tiny_base: Path) -> None:
    def nudge(tensors: Tensors) -> None:
        tensors[TOKEN_TABLE.removeprefix("model.")][3, 3] += 1

    other = open_checkpoint(single_file(change=nudge), config_from=tiny_base)
    assert other.fingerprint() != open_checkpoint(tiny_base).fingerprint()


def test_random_weights_have_the_configs_shapes_and_repeat(tiny_base: Path) -> None:
    real, drawn = open_checkpoint(tiny_base), open_checkpoint(tiny_base, random_init=True)
    shapes = {name: tuple(p.shape) for name, p in load_model(real, "cpu", torch.float32).named_parameters()}
    model = load_model(drawn, "cpu", torch.float32)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert states_equal(drawn, open_checkpoint(tiny_base, random_init=True))
    assert drawn.fingerprint() != real.fingerprint()
    assert torch.equal(drawn.token_rows([1, 2])[1], drawn.token_rows([2])[0])
    assert not torch.equal(drawn.token_rows([1]), drawn.token_rows([2]))


def test_loading_never_holds_a_second_copy(tiny_base: Path, tmp_path: Path) -> None:
    """The process's own memory grows by the float32 model and little more, sampled while it loads."""
    config = json.loads((tiny_base / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drawn = open_checkpoint(tmp_path, random_init=True)
    stored = dict(drawn.read_all(drawn.entries, "cpu", torch.bfloat16))
    save_file(stored, tmp_path / "model.safetensors")
    del stored
    script = f"""
import threading, time, torch
from hdl.o1.checkpoint import load_model, open_checkpoint

def own_memory():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024

checkpoint, peak, done = open_checkpoint({str(tmp_path)!r}), 0, False
before = own_memory()
def watch():
    global peak
    while not done:
        peak = max(peak, own_memory())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(checkpoint, "cpu", torch.float32)
done = True
watcher.join()
print(max(peak, own_memory()) - before, sum(p.numel() * 4 for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, model_bytes = map(int, done.stdout.split())
    assert model_bytes > 150e6
    assert 0.9 * model_bytes < grown < 1.25 * model_bytes, (grown, model_bytes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("language_model.norm.weight"), f"missing: {NORM}"),
        (lambda t: t.update({"language_model.norm.weight": torch.ones(63)}), r"another shape.*norm.weight \[63\] \(expected \[64\]\)"),
        (lambda t: t.update({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}), "unknown: model.double_blocks.0"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(
    single_file: Callable[..., Path], tiny_base: Path, change: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(HdlError, match=message):
        open_checkpoint(single_file(change=change), config_from=tiny_base)


def test_a_truncated_file_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    cut = folder / "model-00003-of-00005.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(HdlError, match=r"model-00003-of-00005.safetensors: not readable.*cut off"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(
        HdlError, match="model-00002-of-00005.safetensors: listed in model.safetensors.index.json"
    ):
        open_checkpoint(folder)


def test_an_index_that_promises_too_much_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    index = folder / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    promised["weight_map"]["model.more.weight"] = "model-00001-of-00005.safetensors"
    index.write_text(json.dumps(promised))
    with pytest.raises(HdlError, match=r"promises tensors it lacks: model\.more\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen3_vl'"),
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": {"hidden_size": 64}}, "text_config lacks .*num_hidden_layers"),
        ({"text_config": {"attention_bias": True}}, "attention_bias is True"),
        ({"text_config": {"head_dim": 32}}, "add up to head_dim/2"),
        ({"text_config": {"hidden_size": 128}}, r"q_proj.weight \[64, 64\] \(expected \[64, 128\]\)"),
    ],
)
def test_the_config_of_another_model_is_refused(
    tiny_base: Path, tmp_path: Path, change: dict, message: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    text = change.get("text_config")
    if text and text != {"hidden_size": 64}:
        change = {"text_config": config["text_config"] | text}
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(HdlError, match=message):
        open_checkpoint(folder)


def test_a_checkpoint_without_tokenizer_opens_but_has_no_prompts(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    save_file(all_tensors(tiny_base), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(HdlError, match=r"no tokenizer there.*copy the published tokenizer files"):
        PromptEncoder(checkpoint)


def test_a_tokenizer_without_chat_template_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(HdlError, match="no chat template"):
        PromptEncoder(open_checkpoint(folder))


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path, single_file: Callable[..., Path]) -> None:
    with pytest.raises(HdlError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(HdlError, match="needs config_from"):
        open_checkpoint(single_file())


def test_a_prompt_longer_than_the_gap_before_the_image_is_refused(tiny_base: Path) -> None:
    with pytest.raises(HdlError, match="too long: the image's positions start at 4096"):
        PromptEncoder(open_checkpoint(tiny_base)).ids("word " * 5000)


# Scaled fp8, as ComfyUI has it.


@pytest.fixture
def fp8_file(tiny_base: Path, tmp_path: Path) -> Path:
    """What tools/merge.py writes of a base and an adapter."""
    base = open_checkpoint(tiny_base)
    adapted = attach(load_model(base, "cpu", torch.float32), Lora(rank=2), "", 0)
    weights = {name: torch.randn(p.shape) * 0.05 for name, p in adapter_parameters(adapted).items()}
    save_adapter(adapted, weights, tmp_path / "lora")
    part = Part("lora", read_adapter_file(tmp_path / "lora"), 0.5)
    for form in ("fp8", "bf16"):
        merge_into_checkpoint(tmp_path / f"{form}.safetensors", base, [part], form, "cpu")
    return tmp_path / "fp8.safetensors"


def test_an_fp8_file_is_read_as_what_it_stands_for(fp8_file: Path, tiny_base: Path) -> None:
    scaled, full = (
        open_checkpoint(file, config_from=tiny_base)
        for file in (fp8_file, fp8_file.with_name("bf16.safetensors"))
    )
    stored = load_file(fp8_file)
    linears = scaled.decoder_matrices()
    assert len(linears) == 28 and linears == full.decoder_matrices()
    for name in linears:
        key = name.removeprefix("model.")
        exact = stored[key].double() * stored[f"{key.removesuffix('weight')}scale_weight"].double()
        assert torch.equal(scaled.read(name, "cpu", torch.float64), exact)
        in_bfloat16 = scaled.read(name, "cpu", torch.bfloat16)
        assert torch.equal(in_bfloat16, exact.float().bfloat16())
        right = full.read(name, "cpu", torch.float32)
        assert (in_bfloat16 - right).norm() / right.norm() < 0.05
    assert scaled.entries.keys() == full.entries.keys() and scaled.fingerprint() == full.fingerprint()
    others = set(expected_shapes(scaled.config)) - set(linears)
    assert all(
        torch.equal(scaled.read(n, "cpu", torch.float32), full.read(n, "cpu", torch.float32)) for n in others
    )
    packed = load_model(scaled, "cpu", torch.float32, absent=True)
    bring_in(packed)
    whole = load_model(scaled, "cpu", torch.float32).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in packed.state_dict().items())


def test_an_fp8_file_can_be_merged_into(fp8_file: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Again in fp8 without a loss, for nothing is added; and in bfloat16, whose linears no scale goes with."""
    base = open_checkpoint(fp8_file, config_from=tiny_base)
    for form in ("fp8", "bf16"):
        out = tmp_path / f"again-{form}.safetensors"
        merge_into_checkpoint(out, base, [], form, "cpu")
        again = open_checkpoint(out, config_from=tiny_base)
        for name in again.decoder_matrices():
            expected = base.read(name, "cpu", torch.float32)
            found = again.read(name, "cpu", torch.float32)
            assert torch.equal(found, expected.bfloat16().float() if form == "bf16" else expected)


def test_a_scale_tells_one_base_from_another(fp8_file: Path, tiny_base: Path) -> None:
    first = open_checkpoint(fp8_file, config_from=tiny_base)
    names, times = first.decoder_matrices(), fp8_file.stat()
    identity = first.identity(names)
    stored = load_file(fp8_file)
    stored["language_model.layers.0.mlp.up_proj.scale_weight"] *= 2
    save_file(stored, fp8_file)
    os.utime(fp8_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_checkpoint(fp8_file, config_from=tiny_base).identity(names) != identity


def test_scales_that_cannot_be_used(fp8_file: Path, tiny_base: Path) -> None:
    stored = load_file(fp8_file)
    linear = "language_model.layers.0.mlp.up_proj"
    rows = len(stored[f"{linear}.weight"])
    for change, message in (
        ({f"{linear}.scale_weight": torch.ones(rows)}, rf"F8_E4M3 with a scale \[{rows}\]"),
        ({f"{linear}.weight": stored[f"{linear}.weight"].bfloat16()}, r"is BF16 with a scale \[\]"),
        (
            {"language_model.layers.0.mlp.other.scale_weight": torch.ones(())},
            "other.scale_weight without the weights",
        ),
    ):
        save_file(stored | change, fp8_file)
        with pytest.raises(HdlError, match=message):
            open_checkpoint(fp8_file, config_from=tiny_base)
    inputs = {f"{linear}.scale_input": torch.ones(())}
    save_file(stored | inputs, fp8_file)
    assert not [name for name in open_checkpoint(fp8_file, config_from=tiny_base).entries if "scale" in name]
