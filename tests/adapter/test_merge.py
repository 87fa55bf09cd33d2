"""Several adapters as one: side by side, summed, truncated, and in the weights of a whole checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdl.adapter import into_checkpoint
from hdl.adapter.formats import Adapter, Pair, read_adapter_file, write_adapter_file
from hdl.adapter.into_checkpoint import merge_into_checkpoint
from hdl.adapter.merge import Part, merge_by_sum, merge_by_svd
from hdl.adapter.metadata import BASE, LICENSE, TRIGGER
from hdl.adapter.stack import attach_adapters, parse_weighted, set_adapters, short_names
from hdl.errors import HdlError
from hdl.o1.checkpoint import INDEX_FILE, Checkpoint, load_model, open_checkpoint
from hdl.o1.layout import Segment, lay_out
from tests.adapter.adapters import made_up

LINEARS = ".language_model.layers."


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint(Path(__file__).parents[1] / "golden" / "o1-tiny")


@pytest.fixture(scope="module")
def parts(base: Checkpoint) -> list[Part]:
    return [
        Part("look", made_up(base, 1, rank=4, odd=True, rslora=True), 0.8),
        Part("pim", made_up(base, 2, rank=3, alpha=3, only="model.", dtype=torch.bfloat16), -0.6),
        Part("tag", made_up(base, 3, rank=2, only="mlp."), 1.5),
    ]


def visible(parts: list[Part]) -> list[Part]:
    """Without the linears of the visual tower, which is no part of the model that draws."""
    return [
        replace(
            p,
            adapter=replace(p.adapter, pairs={m: x for m, x in p.adapter.pairs.items() if "visual" not in m}),
        )
        for p in parts
    ]


def draw(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text, z = torch.randn(6, 64, generator=generator), torch.randn(4, 3072, generator=generator)
    with torch.no_grad():
        return model(text, z, torch.tensor([0.5]), lay_out([Segment(6, 2, 2)]))


def loaded(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]
    return load_model(checkpoint, "cpu", torch.float32)


def change(parts: list[Part], module: str) -> Tensor:
    """The definition: the weighted sum of scale * B A, in float64."""
    having = [p for p in parts if module in p.adapter.pairs]
    pairs = [p.adapter.pairs[module] for p in having]
    return sum(
        p.weight * p.adapter.scale(module) * x.b.double() @ x.a.double() for p, x in zip(having, pairs)
    )  # type: ignore[return-value]


def close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 2e-5 * second.abs().max())


def test_adapters_are_switched_without_touching_the_base(base: Checkpoint, parts: list[Part]) -> None:
    parts = visible(parts)
    model = attach_adapters(loaded(base), {p.name: p.adapter for p in parts})
    plain = draw(loaded(base))
    assert torch.equal(draw(model), plain)
    for chosen in ([0], [1], [2, 0], [0, 1, 2], [1], []):
        set_adapters(model, {parts[i].name: parts[i].weight for i in chosen})
        expected = loaded(base)
        with torch.no_grad():
            for name, weight in expected.named_parameters():
                module = name.removesuffix(".weight")
                if any(module in parts[i].adapter.pairs for i in chosen):
                    weight += change([parts[i] for i in chosen], module)
        assert close(draw(model), draw(expected))
    assert torch.equal(draw(model), plain) and not any(p.requires_grad for p in model.parameters())


def test_a_weight_counts_anew_each_time(base: Checkpoint, parts: list[Part]) -> None:
    model = attach_adapters(loaded(base), {"look": parts[0].adapter})
    set_adapters(model, {"look": 1.0})
    once = draw(model)
    set_adapters(model, {"look": 0.5})
    set_adapters(model, {"look": 1.0})
    assert torch.equal(draw(model), once)


def test_what_cannot_be_switched_on_is_named(base: Checkpoint, parts: list[Part]) -> None:
    model = attach_adapters(loaded(base), {"look": parts[0].adapter})
    with pytest.raises(HdlError, match="no adapter pim here; attached are look"):
        set_adapters(model, {"pim": 1.0})
    for weight in (0.0, float("nan")):
        with pytest.raises(HdlError, match="expected a finite number other than 0"):
            set_adapters(model, {"look": weight})
    with pytest.raises(HdlError, match="adapter pim adapts model.visual.*visual tower is not part of it"):
        attach_adapters(loaded(base), {"pim": parts[1].adapter})


def test_a_weight_stands_after_the_last_colon(tmp_path: Path) -> None:
    there = tmp_path / "run:12"
    there.mkdir()
    for text, path, weight in (
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("runs/b", "runs/b", 1.0),
        ("C:/x/a.safetensors:-1e-1", "C:/x/a.safetensors", -0.1),
        ("C:/x/a.safetensors", "C:/x/a.safetensors", 1.0),
        (str(there), str(there), 1.0),
        (f"{there}:2", str(there), 2.0),
    ):
        found = parse_weighted(text)
        assert (str(found.path), found.weight) == (path, weight)
    for text in ("a:0", "a:nan", "a:-0.0", "a:inf"):
        with pytest.raises(HdlError, match="expected a finite number other than 0"):
            parse_weighted(text)


def test_adapters_get_names_that_peft_takes() -> None:
    for paths, names in (
        (["runs/look/adapter", "x/a.b.safetensors", "adapter"], ["look", "a-b", "adapter"]),
        (["a/run/adapter", "b/run/adapter", "c/pim.safetensors"], ["a-run", "b-run", "pim"]),
        (["/x/a/1.safetensors", "/y/a/1.safetensors", "../1"], ["x-a-1", "y-a-1", "1"]),
        (["look", "look", "look"], ["look", "look-2", "look-3"]),  # an adapter twice, with two weights
    ):
        assert short_names(map(Path, paths)) == names


def test_the_sum_is_the_weighted_sum(base: Checkpoint, parts: list[Part], tmp_path: Path) -> None:
    merged = merge_by_sum(parts)
    for module in merged.pairs:
        pair = merged.pairs[module]
        assert close(merged.scale(module) * pair.b.double() @ pair.a.double(), change(parts, module))
    ranks = {m: sum(p.adapter.pairs[m].rank for p in parts if m in p.adapter.pairs) for m in merged.pairs}
    assert {m: pair.rank for m, pair in merged.pairs.items()} == ranks
    write_adapter_file(merged, tmp_path / "sum", "peft")
    seen = visible([Part("sum", read_adapter_file(tmp_path / "sum"), 1.0)])
    one, several = (
        attach_adapters(loaded(base), {p.name: p.adapter for p in ps}) for ps in (seen, visible(parts))
    )
    set_adapters(one, {"sum": 1.0})
    set_adapters(several, {p.name: p.weight for p in parts})
    assert close(draw(one), draw(several))


def test_the_svd_is_the_nearest_of_its_rank_and_says_what_it_lost(parts: list[Part]) -> None:
    merged, kept = merge_by_svd(parts, 3, "cpu")
    for module, pair in merged.pairs.items():
        whole = change(parts, module)
        s = torch.linalg.svdvals(whole)
        least = (s[3:].square().sum() / s.square().sum()).sqrt()  # Eckart-Young: nothing of rank 3 is nearer
        lost = (whole - merged.scale(module) * pair.b.double() @ pair.a.double()).norm() / whole.norm()
        assert float(lost) == pytest.approx(float(least), abs=1e-6)
        assert kept[module].error == pytest.approx(float(least), abs=1e-6) and pair.rank == kept[module].rank
    assert any(0.1 < k.error < 0.9 for k in kept.values())
    full, everything = merge_by_svd(parts, 64, "cpu")
    assert all(k.energy == pytest.approx(1.0) for k in everything.values())
    module = next(iter(full.pairs))
    assert full.pairs[module].rank == merge_by_sum(parts).pairs[module].rank  # not more than there is


def test_only_what_belongs_together_is_merged(base: Checkpoint, parts: list[Part]) -> None:
    def of(base_name: str) -> Part:
        return replace(
            parts[0], name=base_name, adapter=replace(parts[0].adapter, metadata={BASE: base_name})
        )

    with pytest.raises(HdlError, match="different bases do not add up: one: one, two: two"):
        merge_by_sum([of("one"), of("two")])
    narrow = Adapter({m: Pair(p.a[:, :5], p.b, p.alpha) for m, p in parts[2].adapter.pairs.items()})
    with pytest.raises(
        HdlError, match=r"different shapes .*mlp.down_proj is look: \[64, 160\], n: \[64, 5\]"
    ):
        merge_by_sum([parts[0], Part("n", narrow, 1.0)])
    with pytest.raises(HdlError, match="other than 0"):
        merge_by_svd([replace(parts[0], weight=0.0)], 2, "cpu")
    about = [
        {BASE: "b", TRIGGER: "kotonia style", LICENSE: "CC0"},
        {BASE: "b", TRIGGER: "pim", LICENSE: "MIT"},
    ]
    named = [replace(p, adapter=replace(p.adapter, metadata=a)) for p, a in zip(parts, about)]
    merged = merge_by_sum(named).metadata
    assert merged[BASE] == "b" and merged[TRIGGER] == "kotonia style, pim" and LICENSE not in merged
    assert merged["hdl.merged"] == "look:0.8, pim:-0.6"


@pytest.mark.parametrize("form", ["folder", "single"])
def test_a_merged_checkpoint_draws_as_the_adapters_do(
    base: Checkpoint, parts: list[Part], tmp_path: Path, form: str
) -> None:
    out = tmp_path / ("merged" if form == "folder" else "merged.safetensors")
    verified = merge_into_checkpoint(out, base, parts, "bf16", "cpu")
    assert len(verified.modules) >= 16 and 0.5 < verified.worst <= 1
    again = open_checkpoint(out, base.folder)
    assert again.fingerprint() == base.fingerprint()
    adapted = attach_adapters(loaded(base), {p.name: p.adapter for p in visible(parts)})
    set_adapters(adapted, {p.name: p.weight for p in parts})
    expected, plain = draw(adapted), draw(loaded(base))
    off = (draw(loaded(again)) - expected).norm() / (expected - plain).norm()
    assert off < 0.02  # of what the adapters change; the weights were rounded to bfloat16
    before = {k: v for f in base.path.glob("*.safetensors") for k, v in load_file(f).items()}
    if form == "folder":
        after = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
        names = {f.name for f in base.path.iterdir()}
        assert names == {f.name for f in out.iterdir()} and before.keys() == after.keys()
        for name in names - {f.name for f in out.glob("*.safetensors")}:
            assert (out / name).read_bytes() == (base.path / name).read_bytes()
        assert (out / INDEX_FILE).exists()
    else:
        after = {f"model.{k}": v for k, v in load_file(out).items()}
        gone = before.keys() - after.keys()
        assert gone and all(k.startswith(("lm_head.", "model.visual.deepstack_merger_list.")) for k in gone)
    touched = {m for p in parts for m in p.adapter.pairs}
    for name, weight in after.items():
        same = weight.dtype == before[name].dtype and torch.equal(weight, before[name])
        assert same == (name.removesuffix(".weight") not in touched), name


def test_merged_into_a_single_file_it_keeps_that_files_names(
    base: Checkpoint, parts: list[Part], tmp_path: Path
) -> None:
    merge_into_checkpoint(tmp_path / "a.safetensors", base, parts, "bf16", "cpu")
    prefixed = {f"diffusion_model.{k}": v for k, v in load_file(tmp_path / "a.safetensors").items()}
    save_file(prefixed, tmp_path / "b.safetensors")
    single = open_checkpoint(tmp_path / "b.safetensors", base.folder)
    part = replace(parts[2], weight=-1.0)
    merge_into_checkpoint(tmp_path / "c.safetensors", single, [part], "bf16", "cpu")
    assert load_file(tmp_path / "c.safetensors").keys() == prefixed.keys()
    with pytest.raises(HdlError, match="is a single file, which lacks tensors of the published folder"):
        merge_into_checkpoint(tmp_path / "folder", single, [part], "bf16", "cpu")


def test_scaled_fp8_is_what_comfyui_reads(base: Checkpoint, parts: list[Part], tmp_path: Path) -> None:
    """Undone as ComfyUI does it, weight * scale_weight, it is base + sum within e4m3's rounding."""
    verified = merge_into_checkpoint(tmp_path / "a.safetensors", base, parts[:1], "fp8", "cpu")
    assert 0.5 < verified.worst <= 1
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["scaled_fp8"].dtype == torch.float8_e4m3fn and tensors["scaled_fp8"].numel() == 2
    quantized = {k.removesuffix(".scale_weight") for k in tensors if k.endswith(".scale_weight")}
    assert {f"model.{k}" for k in quantized} == set(parts[0].adapter.pairs)
    for name in quantized:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale_weight"]
        assert weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == ()
        module = f"model.{name}"
        exact = base.read(f"{module}.weight", "cpu", torch.float64) + change(parts[:1], module)
        assert (weight.double() * scale - exact).abs().max() <= exact.abs().max() / 448 * 16 * 1.001
        assert weight.double().abs().max() == 448  # the whole of e4m3's range is used
    kept = (
        tensors.keys()
        - {f"{n}.{end}" for n in quantized for end in ("weight", "scale_weight")}
        - {"scaled_fp8"}
    )
    assert all(tensors[k].dtype == torch.bfloat16 for k in kept)
    with pytest.raises(HdlError, match="fp8 is a form of the single file"):
        merge_into_checkpoint(tmp_path / "folder", base, parts[:1], "fp8", "cpu")


def test_what_is_written_wrong_is_seen_and_not_kept(
    base: Checkpoint, parts: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = into_checkpoint.put
    monkeypatch.setattr(into_checkpoint, "put", lambda t, out: put(t * 1.02, out))
    for out in (tmp_path / "folder", tmp_path / "a.safetensors"):
        with pytest.raises(HdlError, match=r"roundings away from base \+ adapters"):
            merge_into_checkpoint(out, base, parts, "bf16", "cpu")
    assert not list(tmp_path.iterdir())


def test_a_merge_never_holds_the_model(base: Checkpoint, parts: list[Part], tmp_path: Path) -> None:
    """Its memory does not grow with the number of layers: one tensor is read at a time, and let go."""
    alive, most = [], 0

    class Watched(Checkpoint):
        def read(self, name, device, dtype):  # type: ignore[no-untyped-def]
            import weakref

            nonlocal most
            tensor = super().read(name, device, dtype)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    shutil.copytree(base.path, tmp_path / "base")
    watched = Watched(base.path, base.folder, base.entries)
    merge_into_checkpoint(tmp_path / "out", watched, parts, "bf16", "cpu")
    assert len(alive) > 50 and most <= 2
    assert json.loads((tmp_path / "out" / INDEX_FILE).read_text()) == json.loads(
        (base.path / INDEX_FILE).read_text()
    )
