"""What can be asked of the decoder's path where, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import torch

from hdl.errors import HdlError
from hdl.o1.config import O1Config, read_config
from hdl.sample import path
from hdl.sample.path import DecoderPath, PathOptions, choose_path

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def config() -> O1Config:
    return read_config(Path(__file__).parents[1] / "o1" / "o1-8b-config.json")


def chosen(config: O1Config, device: torch.device, *options: object) -> DecoderPath:
    return choose_path(PathOptions(*options), config, device, torch.bfloat16)  # type: ignore[arg-type]


def test_what_is_taken(config: O1Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "supports_fp8", lambda device: True)
    assert chosen(config, CPU) == DecoderPath(False, "full")
    assert chosen(config, CPU, "full", 0, "fused") == DecoderPath(True, "full")
    assert chosen(config, CPU, "fp8") == chosen(config, CUDA, "fp8") == DecoderPath(True, "fp8")
    assert chosen(config, CUDA) == DecoderPath(True, "full")
    assert chosen(config, CUDA, "nf4") == DecoderPath(True, "nf4")
    assert chosen(config, CUDA, "full", 0, "plain") == DecoderPath(False, "full")


def test_fp8_is_only_kept_before_ada(config: O1Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "supports_fp8", lambda device: False)
    old = chosen(config, CUDA, "fp8")
    assert old.fused and old.weights == "fp8_stored" and "no fp8 arithmetic" in old.notices[0]


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        (CPU, ("nf4",), "weights nf4 needs a CUDA GPU"),
        (CPU, ("full", 2), "stream 2 needs the fused path, but a CPU gains nothing from it; use stream 0, or kernels fused"),
        (CUDA, ("fp8", 0, "plain"), "weights fp8 needs the fused path, but kernels is plain; use weights full"),
        (CUDA, ("full", 37), "stream 37: the model has 36 layers"),
        (CUDA, ("full", -1), "stream -1: the model has 36 layers"),
    ],
)  # fmt: skip
def test_what_is_refused(config: O1Config, device: torch.device, options: tuple, message: str) -> None:
    with pytest.raises(HdlError, match=message):
        chosen(config, device, *options)


def test_a_host_without_the_memory(config: O1Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 layers of 193 M numbers are 12.9 GiB in bfloat16; fp8 is half of it."""
    monkeypatch.setattr(path, "available", lambda: (10 * 2**30, "of this machine"))
    monkeypatch.setattr(path, "supports_fp8", lambda device: True)
    with pytest.raises(
        HdlError, match=r"keeps 12\.9 GiB .* 10\.0 GiB are available \(of this machine\); stream at most 27"
    ):
        chosen(config, CUDA, "full", 36)
    assert chosen(config, CUDA, "fp8", 36).fused
