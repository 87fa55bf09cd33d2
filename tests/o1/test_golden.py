"""hdl computes the model's own numbers, and the check that says so can fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hdl.errors import HdlError
from hdl.golden import check_case, open_golden

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_golden_case(case: dict, golden: Path) -> None:
    opened, _ = open_golden(golden)
    checks = check_case(opened, case)
    assert {"t2i": 5, "train": 11, "sample": 10, "edit": 10}[case["kind"]] == len(checks)
    assert [c for c in checks if not c.passed] == []


# One number of every stored kind, moved a little beyond its bound.
@pytest.mark.parametrize(
    ("file", "tensor", "change"),
    [
        ("t2i_1.safetensors", "x_pred", lambda t: t * (1 + 3e-5)),
        ("t2i_1.safetensors", "position_ids", lambda t: t + (t == 4097)),
        ("t2i_1.safetensors", "token_types", lambda t: 1 - t),
        ("t2i_1.safetensors", "input_ids", lambda t: t.flip(0)),
        ("train_0.safetensors", "z", lambda t: t + 1e-3),
        ("train_0.safetensors", "grad.model.language_model.layers.1.self_attn.k_proj.weight", lambda t: t * 1.0003),
        ("train_0.safetensors", "loss", None),
        ("sample_full.safetensors", "timesteps", lambda t: t.roll(1)),
        ("sample_dev_fm.safetensors", "image", lambda t: t ^ 2),
        ("sample_dev.safetensors", "step_noise", lambda t: -t),
        ("edit1.safetensors", "z_init", lambda t: t.roll(1, 0)),
        ("edit1.safetensors", "position_ids", lambda t: t - (t == 4099).long()),
        ("edit2.safetensors", "x_pred_first", lambda t: t * (1 + 3e-5)),
        ("edit2.safetensors", "input_ids", lambda t: t.flip(-1)),
    ],
)  # fmt: skip
def test_verify_fails_on_a_perturbed_case(
    golden: Path, tmp_path: Path, file: str, tensor: str, change
) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(golden, folder)
    index = json.loads((folder / "index.json").read_text())
    index["cases"] = [case for case in index["cases"] if case["file"] == file]
    if change is None:
        index["cases"][0]["loss"] *= 1 + 3e-6
    else:
        stored = load_file(folder / file)
        stored[tensor] = change(stored[tensor])
        save_file(stored, folder / file)
    (folder / "index.json").write_text(json.dumps(index))
    opened, cases = open_golden(folder)
    assert any(not check.passed for check in check_case(opened, cases[0]))


def test_the_tool_prints_a_table_and_its_status_tells(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(golden, folder)
    index = json.loads((folder / "index.json").read_text())
    index["cases"] = [case for case in index["cases"] if case["file"] == "t2i_1.safetensors"]
    (folder / "index.json").write_text(json.dumps(index))

    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "tools/verify.py", "--golden", str(folder)], capture_output=True, text=True
        )

    good = verify()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "5 checks, 0 missed" in good.stdout
    stored = load_file(folder / "t2i_1.safetensors")
    stored["x_pred"][0, 0] += 1
    save_file(stored, folder / "t2i_1.safetensors")
    bad = verify()
    assert bad.returncode == 1 and "MISS" in bad.stdout


def test_a_folder_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HdlError, match="not a golden folder"):
        open_golden(tmp_path)
