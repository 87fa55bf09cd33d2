"""The command lines over hdl/adapter, as a user calls them, on the tiny golden checkpoint."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from hdl.adapter.formats import read_adapter_file, write_adapter_file
from hdl.adapter.metadata import BASE, LICENSE, TRIGGER
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from tests.adapter.adapters import made_up, same

LINEARS = ".language_model.layers."


@pytest.fixture
def loras(tiny_base: Path, tmp_path: Path) -> dict[str, Path]:
    base = open_checkpoint(tiny_base)
    about = {BASE: base.fingerprint()}
    files = {"look": tmp_path / "look" / "adapter", "pim": tmp_path / "pim.safetensors"}
    write_adapter_file(made_up(base, 1, **about, **{TRIGGER: "kotonia style"}), files["look"], "peft")
    write_adapter_file(made_up(base, 2, odd=True, **about, **{TRIGGER: "pim"}), files["pim"], "kohya")
    return files


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [tool, *map(str, arguments)])
    import_module(f"tools.{tool}").main()


def test_convert_tells_what_it_found_and_writes_it(
    loras: dict[str, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.safetensors"
    run(monkeypatch, "convert", loras["pim"], "--info", "--base", tiny_base)
    told = capsys.readouterr().out
    for line in (
        "format    kohya",
        "modules   28",
        "rank      4 (23x), 5 (5x)",
        "dtype     float32",
        "its base: yes",
    ):
        assert line in told
    run(
        monkeypatch,
        "convert",
        loras["pim"],
        out,
        "--to",
        "comfyui",
        "--license",
        "CC0",
        "--trigger",
        "pim, the fish",
    )
    written = read_adapter_file(out)
    assert same(written, read_adapter_file(loras["pim"])) and written.format == "comfyui"
    assert written.metadata[LICENSE] == "CC0" and written.metadata[TRIGGER] == "pim, the fish"
    run(monkeypatch, "convert", loras["pim"], tmp_path / "half", "--to", "peft", "--dtype", "bfloat16")
    assert next(iter(read_adapter_file(tmp_path / "half").pairs.values())).a.dtype == torch.bfloat16
    with pytest.raises(HdlError, match="give OUT and --to, or --info"):
        run(monkeypatch, "convert", loras["pim"], tmp_path / "x.safetensors")


def test_merge_makes_one_of_two(
    loras: dict[str, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    both = ("--base", tiny_base, "--lora", f"{loras['look']}:0.8", "--lora", f"{loras['pim']}:-0.5")
    run(monkeypatch, "merge", tmp_path / "sum", *both)
    assert "28 linears, rank 8 to 9" in capsys.readouterr().out
    run(
        monkeypatch,
        "merge",
        tmp_path / "svd.safetensors",
        *both,
        "--method",
        "svd",
        "--rank",
        3,
        "--format",
        "kohya",
    )
    told = capsys.readouterr().out
    assert told.count("energy kept") == 4 and "28 linears, rank 3 to 3" in told
    assert read_adapter_file(tmp_path / "svd.safetensors").metadata["hdl.merged"] == "look:0.8, pim:-0.5"
    run(monkeypatch, "merge", tmp_path / "all.safetensors", *both, "--into", "checkpoint", "--weights", "fp8")
    assert "merged linears read again, off by at most" in capsys.readouterr().out
    for wrong, says in (
        (("--rank", 3), "--rank goes with --method svd"),
        (("--into", "checkpoint", "--method", "svd", "--rank", 3), "adds the sum itself"),
        (("--lora", f"{loras['look']}:0"), "other than 0"),
    ):
        with pytest.raises(HdlError, match=says):
            run(monkeypatch, "merge", tmp_path / "wrong", *both, *wrong)


def test_stack_draws_everybody_with_everybody(
    loras: dict[str, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    both = ("--lora", loras["look"], "--lora", loras["pim"])
    small = ("--height", 32, "--width", 64, "--steps", 2, "--guidance-scale", 1, "--together", 8)
    run(
        monkeypatch,
        "stack",
        tmp_path / "out",
        "--base",
        tiny_base,
        *both,
        *small,
        "--prompt",
        "a boat",
        "--prompt",
        "b",
    )
    told = capsys.readouterr().out
    assert "look, pim: overlap of rows" in told and "look + pim" in told and "whose \\ by" in told
    changes = (tmp_path / "out" / "changes.txt").read_text().splitlines()
    assert changes[1].split() == ["on", "\\", "asked", "none", "look", "pim", "look", "+", "pim"]
    assert all(float(number) > 0 for number in changes[2].split()[1:])
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "overlap.txt", "overlap.png", "changes.txt", "pictures.png"
    }  # fmt: skip
    assert Image.open(tmp_path / "out" / "pictures.png").width > 4 * 64
    with pytest.raises(HdlError, match="two adapters or more"):
        run(monkeypatch, "stack", tmp_path / "one", "--lora", loras["look"])
    with pytest.raises(HdlError, match="1 --trigger for 2 --lora"):
        run(monkeypatch, "stack", tmp_path / "one", *both, "--trigger", "x")
    nameless = tmp_path / "nameless.safetensors"
    write_adapter_file(made_up(open_checkpoint(tiny_base), 5), nameless, "kohya")
    with pytest.raises(HdlError, match="nameless names no trigger phrase"):
        run(
            monkeypatch, "stack", tmp_path / "two", "--base", tiny_base, "--prompt", "x",
            "--lora", loras["look"], "--lora", nameless,
        )  # fmt: skip
