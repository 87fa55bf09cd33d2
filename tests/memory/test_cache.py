"""Weights kept in their packed form: what is read is what was made, and nothing else is ever taken for it."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdl.kernels.fuse import fuse
from hdl.memory import cache as caching
from hdl.memory.cache import FORMS, WeightCache, checksum, made_with
from hdl.memory.host import Alone
from hdl.memory.streaming import _Block, resident, spread
from hdl.o1.checkpoint import Checkpoint, open_checkpoint
from tests.memory.test_absent import adapted, x_pred
from tests.memory.test_streaming import decoder_of

LAYERS = 4
PACKED = list(FORMS)


@pytest.fixture(autouse=True)
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the weights that were read from the base one by one, to be packed."""
    names: list[str] = []
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, *place: Any) -> Tensor:
        names.append(name)
        return read(self, name, *place)

    monkeypatch.setattr(Checkpoint, "read", counted)
    yield names


def opened(folder: Path, base: Path, form: str) -> WeightCache:
    checkpoint = open_checkpoint(base)
    identity = checkpoint.identity(checkpoint.decoder_matrices())
    return WeightCache(folder, FORMS[form], f"{identity} {made_with(FORMS[form], torch.float32, CPU)}")


CPU = torch.device("cpu")


def packed(base: Path, form: str, cache: WeightCache | None, **settings: Any) -> PeftModel:
    model = adapted(base, absent=True)
    fuse(model, weights=form, cache=cache, **settings)
    return model


def held(model: PeftModel) -> list[Tensor]:
    """Everything that the packed linears keep of the frozen weights, streamed layers' host memory included."""
    decoder = decoder_of(model)
    streaming, found = decoder.streaming, list[Tensor]()
    for j, i in enumerate(spread(streaming.count, LAYERS) if streaming.count else []):
        block = _Block([linear.kept_as() for linear in decoder.layers[i].linears])  # type: ignore[attr-defined]
        found += [part for linear in block.views(streaming._blocks[j]) for part in linear]
    for layer in decoder.layers:
        if layer.visit is not resident:
            continue  # what is in the slots depends on who was there last
        for linear in layer.linears:
            for name, thing in sorted(vars(linear).items()):
                if name in ("weight", "_kept"):
                    found += [thing.values, thing.scale]
                elif name == "kept" and isinstance(thing, list):
                    for values, state in thing:
                        found += [values, state.absmax, state.state2.absmax, state.offset]
                elif name == "kept":
                    found += [thing.values, thing.scale]
    return found


def same(a: PeftModel, b: PeftModel) -> bool:
    drawn = torch.equal(x_pred(a), x_pred(b))  # and the adapter is in the packed weights from then on
    pairs = list(zip(held(a), held(b), strict=True))
    equal = [x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in pairs]
    return bool(pairs) and all(equal) and drawn


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("streamed", [0, 3])
@pytest.mark.parametrize("form", PACKED)
def test_what_is_read_is_what_was_made(
    tiny_base: Path, tmp_path: Path, form: str, streamed: int, reads: list[str]
) -> None:
    fresh = packed(tiny_base, form, None, stream=streamed)
    reads.clear()
    first, second = opened(tmp_path, tiny_base, form), opened(tmp_path, tiny_base, form)
    made = packed(tiny_base, form, first, stream=streamed)
    assert len(first.made) == LAYERS and not first.read and len(reads) == 7 * LAYERS
    reads.clear()
    read = packed(tiny_base, form, second, stream=streamed)
    assert len(second.read) == LAYERS and not second.made and not reads, "the base's weights are left alone"
    assert same(made, fresh) and same(read, fresh)
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == [f"layer-{i:02d}.safetensors" for i in range(LAYERS)]


def test_one_folder_serves_all_ways_to_keep_e4m3(tiny_base: Path, tmp_path: Path, reads: list[str]) -> None:
    packed(tiny_base, "fp8", opened(tmp_path, tiny_base, "fp8"))
    for form, streamed in (("fp8_once", 0), ("fp8_stored", 0), ("fp8", 4), ("fp8_once", 2)):
        fresh = packed(tiny_base, form, None, stream=streamed)
        reads.clear()
        assert same(packed(tiny_base, form, opened(tmp_path, tiny_base, form), stream=streamed), fresh)
        assert not reads
    packed(tiny_base, "nf4", opened(tmp_path, tiny_base, "nf4"))
    assert len(reads) == 7 * LAYERS and len(list(tmp_path.iterdir())) == 2


def single_file(base: Path, folder: Path) -> Path:
    """ComfyUI's form of the same base."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    tensors: dict[str, Tensor] = {}
    for file in base.glob("*.safetensors"):
        tensors |= {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(
        {n: t for n, t in tensors.items() if not n.startswith(("lm_head", "visual"))},
        folder / "o1.safetensors",
    )
    return folder / "o1.safetensors"


def test_from_the_single_file_too(tiny_base: Path, tmp_path: Path, reads: list[str]) -> None:
    base = single_file(tiny_base, tmp_path / "single")
    fresh = packed(tiny_base, "fp8_once", None)
    for count in (7 * LAYERS, 0):
        reads.clear()
        assert same(packed(base, "fp8_once", opened(tmp_path / "cache", base, "fp8_once")), fresh)
        assert len(reads) == count


def changed(base: Path, folder: Path, name: str) -> Path:
    """A base that differs in one tensor's numbers alone, with the first one's sizes and times."""
    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name] * 1.01
            with safe_open(base / file.name, framework="pt") as original:
                save_file(tensors, file, metadata=original.metadata())
        assert file.stat().st_size == (base / file.name).stat().st_size
        shutil.copystat(base / file.name, file)
    return folder


def test_another_base_has_another_folder(tiny_base: Path, tmp_path: Path, reads: list[str]) -> None:
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    other = changed(tiny_base, tmp_path / "other", name)
    packed(tiny_base, "fp8_once", opened(tmp_path / "cache", tiny_base, "fp8_once"))
    reads.clear()
    model = packed(other, "fp8_once", opened(tmp_path / "cache", other, "fp8_once"))
    assert len(reads) == 7 * LAYERS and same(model, packed(other, "fp8_once", None))


def test_what_makes_a_base_another_one(tiny_base: Path, tmp_path: Path) -> None:
    def identity(base: Path) -> str:
        checkpoint = open_checkpoint(base)
        return checkpoint.identity(checkpoint.decoder_matrices())

    moved = tmp_path / "moved"
    shutil.copytree(tiny_base, moved)  # with its times
    assert identity(moved) == identity(tiny_base)
    file = next(moved.glob("*.safetensors"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert identity(moved) != identity(tiny_base), "touched: anything may have changed in between the samples"
    for name in open_checkpoint(tiny_base).decoder_matrices()[::9]:
        assert identity(changed(tiny_base, tmp_path / name, name)) != identity(tiny_base)
    assert made_with("e4m3", torch.float32, CPU) != made_with("e4m3", torch.bfloat16, CPU)
    assert "bitsandbytes" in made_with("nf4", torch.bfloat16, torch.device("cuda"))


def flip(file: Path, place: int) -> None:
    """Change one byte, counted from the end."""
    content = bytearray(file.read_bytes())
    content[-place] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def of_another_base(file: Path) -> None:
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
    save_file(load_file(file), file, metadata=about | {"base": "1 e4m3 somebody else's"})


def of_another_shape(file: Path) -> None:
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
    tensors = load_file(file)
    tensors["self_attn.q_proj.scale"] = tensors["self_attn.q_proj.scale"][:-1].clone()
    save_file(tensors, file, metadata=about)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: flip(file, 1), "damaged"),
        (lambda file: flip(file, 30_000), "damaged"),
        (cut, "not readable"),
        (lambda file: file.write_bytes(b""), "not readable"),
        (of_another_base, "another base"),
        (of_another_shape, "has self_attn.q_proj.scale as"),
        (lambda file: file.unlink(), None),
    ],
    ids=["last byte", "some byte", "cut off", "empty", "another base", "another shape", "gone"],
)
@pytest.mark.parametrize("form", ["fp8_once", "fp8"])
def test_nothing_is_trained_on_a_damaged_file(
    tiny_base: Path, tmp_path: Path, form: str, spoil: Any, said: str | None, reads: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fresh = packed(tiny_base, form, None)
    packed(tiny_base, form, opened(tmp_path, tiny_base, form))
    file = opened(tmp_path, tiny_base, form).file(1)
    spoil(file)
    for attempt in range(
        3
    ):  # the damage may show after some of its weights were read; then the next start mends it
        reads.clear()
        cache = opened(tmp_path, tiny_base, form)
        assert same(packed(tiny_base, form, cache), fresh)
        assert all(".layers.1." in name for name in reads)
        printed = capsys.readouterr().out
        if attempt == 0:
            assert cache.made == {1}
            assert (said in printed and str(file) in printed) if said else not printed
    assert not reads and cache.read == set(range(LAYERS))


def test_a_start_that_is_cut_short_goes_on_where_it_was(
    tiny_base: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = caching.save_file

    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        write(tensors, path, metadata)
        if "layer-02" in path.name:
            cut(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caching, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            packed(tiny_base, "fp8_once", opened(tmp_path, tiny_base, "fp8_once"))
    cache = opened(tmp_path, tiny_base, "fp8_once")
    assert [path.name for path in sorted(cache.folder.iterdir())] == [
        f"layer-0{i}.safetensors" for i in (0, 1)
    ]
    old = cache.folder / ".layer-02-1-abcd.part"
    for name, age in ((old, 2 * caching.DAY), (cache.folder / ".layer-03-2-abcd.part", 10)):
        name.write_bytes(b"half a file")
        os.utime(name, (time.time() - age,) * 2)
    reads.clear()
    packed(tiny_base, "fp8_once", cache)
    assert len(reads) == 14 and cache.read == {0, 1} and cache.made == {2, 3}
    left = [path.name for path in cache.folder.glob("*.part")] + [
        path.name for path in cache.folder.glob(".*.part")
    ]
    assert set(left) == {".layer-03-2-abcd.part"}, "what somebody may still be writing stays"


def test_a_full_disk_stops_no_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "save_file", full)
    cache = opened(tmp_path, tiny_base, "nf4")
    assert same(packed(tiny_base, "nf4", cache), packed(tiny_base, "nf4", None))
    printed = capsys.readouterr().out
    assert printed.count("No space left on device") == 1 and not list(cache.folder.iterdir())


class OtherRank(Alone):
    """The second process of this machine."""

    def gather(self, thing: Any) -> list[Any]:
        if isinstance(thing, tuple) and len(thing) == 2 and thing[1] == os.getpid():
            return [(thing[0], 1), thing]
        return [thing]


def test_one_rank_of_a_machine_writes(tiny_base: Path, tmp_path: Path, reads: list[str]) -> None:
    cache = opened(tmp_path, tiny_base, "fp8_once")
    fresh = packed(tiny_base, "fp8_once", None)
    assert same(packed(tiny_base, "fp8_once", cache, ranks=OtherRank()), fresh)
    assert not cache.folder.exists(), "it is for the first rank to write what every rank makes"
    packed(tiny_base, "fp8_once", opened(tmp_path, tiny_base, "fp8_once"))
    reads.clear()
    assert same(
        packed(tiny_base, "fp8_once", opened(tmp_path, tiny_base, "fp8_once"), ranks=OtherRank()), fresh
    )
    assert not reads, "and every rank reads"


def test_the_checksum_sees_what_can_go_wrong() -> None:
    tensor = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    right = checksum(tensor)
    assert checksum(tensor.clone()) == right and checksum(torch.cat([tensor, tensor], 1)[:, :7]) == right
    swapped = tensor.clone()
    swapped[[2, 5]] = swapped[[5, 2]]
    shifted, flipped, cleared = tensor.roll(2), tensor.clone(), tensor.clone()
    bits(flipped)[100] ^= 1
    cleared[10:20] = 0
    for wrong in (swapped, shifted, flipped, cleared):
        assert checksum(wrong) != right
    assert len({checksum(torch.tensor(float(x))) for x in range(5)}) == 5
    everything = torch.randn(64, 64).to(torch.float8_e4m3fn)
    assert checksum(everything) == checksum(everything.view(torch.uint8))
