"""Adapters merged into a whole checkpoint: W + sum_i weight_i scale_i B_i A_i written in W's place.

One tensor is in memory at a time, read, added to in float32, rounded and written; every other tensor is copied byte
for byte. Two forms:
- a folder like the published one: same shards, same index, config and tokenizer beside them;
- one .safetensors file as ComfyUI has it: names without `model.`, no `lm_head`, no deepstack mergers. In bfloat16, or
  with the decoder's linears in e4m3 with one float32 scale a matrix, as ComfyUI's scaled fp8 names it:
  `<linear>.weight` = round(W / scale), `<linear>.scale_weight` = max|W| / 448, and an empty marker `scaled_fp8`. Its
  two elements ask for products in full precision, as there are no scales for what comes in (comfy/utils.py,
  `convert_old_quants`). hdl opens it as it opens the others (hdl/o1/checkpoint.py), as a base to merge into too; but
  its own e4m3, with a scale a row (model.weights), is made nearer to the model from the bfloat16 forms.

What was written is read again: a sample of the merged linears is compared with base + sum, computed anew in float64.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from hdl.adapter.merge import Part, modules_of, refuse_dora, stacked
from hdl.adapter.names import DECODER
from hdl.errors import HdlError
from hdl.o1.checkpoint import INDEX_FILE, TOKEN_TABLE, Checkpoint
from hdl.tensor_files import Kind, Place, copy, opened, places, put, whole, write

Weights = Literal["bf16", "fp8"]
# The single file's names, as the project's facts about the model have them; other code found in public reads the
# published one with `model.` in front. hdl and musubi-tuner read both.
SINGLE_FILE_DROPS = "model."
SINGLE_FILE_LACKS = ("lm_head.", "model.visual.deepstack_merger_list.")
E4M3_MAX = 448.0
CHECKED = 16  # merged linears read again
LEFT_BEHIND = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", ".*")  # of the folder
# Largest rounding error of numbers from 1 to 2, and the least number below which it shrinks no more.
ROUNDING = {torch.bfloat16: (2.0**-8, 2.0**-126), torch.float8_e4m3fn: (2.0**-4, 2.0**-6)}
FLOAT32_SLACK = 2.0**-20  # of the sum's terms; float32 keeps 2^-24, over sums of some hundred


@dataclass(frozen=True)
class Verified:
    """What reading again showed. worst: the largest deviation, of the largest that rounding may make."""

    modules: list[str]
    worst: float


@dataclass(frozen=True)
class Job:
    """What to merge: the linears named `module.weight` in `merged` change."""

    checkpoint: Checkpoint
    parts: Sequence[Part]
    weights: Weights
    device: torch.device | str

    @cached_property
    def merged(self) -> dict[str, str]:
        """Tensor -> module."""
        return {f"{module}.weight": module for module in modules_of(self.parts)}

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor with what the adapters add, computed in `dtype`."""
        weight = self.checkpoint.read(name, self.device, dtype)
        return weight + self.change(name, dtype) if name in self.merged else weight

    def change(self, name: str, dtype: torch.dtype) -> Tensor:
        pair = stacked(self.parts, self.merged[name], dtype, self.device)
        return pair.b @ pair.a


@dataclass(frozen=True)
class Planned:
    """A tensor of the new file."""

    kind: Kind
    write: Callable[[BinaryIO], object]


def merge_into_checkpoint(
    out: Path, checkpoint: Checkpoint, parts: Sequence[Part], weights: Weights, device: torch.device | str
) -> Verified:
    """Write `checkpoint` with the adapters added to `out`: a single file if it ends in .safetensors, else a folder.

    The adapters must fit (hdl.adapter.formats.check_fits). HdlError when `out` is there, when the form asked for
    cannot be made of this checkpoint, when an adapter is a DoRA, and when what was written is not what it should be; nothing is left then.
    """
    refuse_dora(parts)
    single = out.suffix == ".safetensors"
    if weights == "fp8" and not single:
        raise HdlError(
            f"{out}: fp8 is a form of the single file; name an output ending in .safetensors, or bf16"
        )
    if not single and not checkpoint.path.is_dir():
        raise HdlError(
            f"{checkpoint.path} is a single file, which lacks tensors of the published folder (lm_head, deepstack); "
            "name an output ending in .safetensors, or merge into the published folder"
        )
    job = Job(checkpoint, parts, weights, device)
    entries = checkpoint.entries
    files = sorted({entry.file for entry in entries.values()})
    with whole(out) as target:
        if single:
            named = {name: _single_file_key(checkpoint, name) for name in entries}
            keys = {name: key for name, key in named.items() if key}
            _write(job, target, keys)
            written = {name: (target, keys[name]) for name in job.merged if name in keys}
        else:
            _copy_around(checkpoint.path, target)
            for file in files:
                own = {name: entry.key for name, entry in entries.items() if entry.file == file}
                if own.keys() & job.merged.keys():
                    _write(job, target / file.name, own)
                else:
                    shutil.copyfile(file, target / file.name)
            written = {name: (target / entries[name].file.name, entries[name].key) for name in job.merged}
        return _verify(job, written)


def _write(job: Job, file: Path, keys: dict[str, str]) -> None:
    """Write one file. keys: its tensors, name -> key there."""
    entries = job.checkpoint.entries
    stored = {source: places(source) for source in {entries[name].file for name in keys}}
    plan: dict[str, Planned] = {}
    for name, key in keys.items():
        entry = entries[name]
        place = stored[entry.file][0][entry.key]
        if job.weights == "fp8" and _is_decoder_linear(name):
            plan[key] = Planned(
                Kind("F8_E4M3", entry.shape, place.kind.elements), partial(_put_e4m3, job, name)
            )
            scale = f"{key.removesuffix('weight')}scale_weight"
            plan[scale] = Planned(Kind("F32", (), 4), partial(_put_scale, job, name))
        elif name in job.merged or entry.scale:  # a scale is not written beside what is copied
            plan[key] = Planned(
                Kind("BF16", entry.shape, 2 * place.kind.elements), partial(_put_bfloat16, job, name)
            )
        else:
            plan[key] = Planned(place.kind, partial(_copy, entry.file, place))
    metadata = {k: v for _, about in stored.values() for k, v in about.items()}
    metadata["hdl.merged"] = ", ".join(f"{part.name}:{part.weight:g}" for part in job.parts)
    if job.weights == "fp8":
        beginning = keys[TOKEN_TABLE].partition("language_model.")[0]
        marker = torch.zeros(2, dtype=torch.float8_e4m3fn)
        plan[f"{beginning}scaled_fp8"] = Planned(Kind("F8_E4M3", (2,), 2), partial(put, marker))
    progress = tqdm(
        total=len(plan), desc=f"writing {file.name.removesuffix('.partial').strip('.')}", unit="tensor"
    )

    def write_tensor(key: str, out: BinaryIO) -> None:
        plan[key].write(out)
        progress.update()

    with progress:
        write(file, {key: planned.kind for key, planned in plan.items()}, metadata, write_tensor)


def _put_bfloat16(job: Job, name: str, out: BinaryIO) -> None:
    put(job.weight(name, torch.float32).to(torch.bfloat16), out)


def _put_e4m3(job: Job, name: str, out: BinaryIO) -> None:
    weight = job.weight(name, torch.float32)
    put((weight / _scale(weight)).to(torch.float8_e4m3fn), out)


def _put_scale(job: Job, name: str, out: BinaryIO) -> None:
    """Scales stand before their matrices in the file: the sum is computed twice rather than kept."""
    put(_scale(job.weight(name, torch.float32)), out)


def _scale(weight: Tensor) -> Tensor:
    peak = weight.abs().amax()
    return torch.where(peak > 0, peak / E4M3_MAX, 1.0)


def _copy(file: Path, place: Place, out: BinaryIO) -> None:
    with open(file, "rb") as source:
        copy(source, place, out)


def _copy_around(folder: Path, target: Path) -> None:
    """Everything of the folder but weights: config, tokenizer, and the index, as names and places stay."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    assert (target / INDEX_FILE).exists() == (folder / INDEX_FILE).exists()


def _single_file_key(checkpoint: Checkpoint, name: str) -> str | None:
    """A tensor's key in the single file, None for what it lacks. A single file keeps its own."""
    if checkpoint.path.is_file():
        return checkpoint.entries[name].key
    return None if name.startswith(SINGLE_FILE_LACKS) else name.removeprefix(SINGLE_FILE_DROPS)


def _is_decoder_linear(name: str) -> bool:
    return name.startswith("model.language_model.layers.") and name.removesuffix(".weight").endswith(DECODER)


def _verify(job: Job, written: dict[str, tuple[Path, str]]) -> Verified:
    """Read some of the merged linears again; HdlError when one is further from base + sum than rounding takes it."""
    names = sorted(written)[:: max(1, len(written) // CHECKED)]
    worst = 0.0
    for name in names:
        file, key = written[name]
        with opened(file) as tensors:
            found = tensors.get_tensor(key)
            scale = f"{key.removesuffix('weight')}scale_weight"
            factor = float(tensors.get_tensor(scale)) if found.dtype == torch.float8_e4m3fn else 1.0
        base, change = (t.double().cpu() for t in (job.checkpoint.read(name, job.device, torch.float64),
                                                   job.change(name, torch.float64)))  # fmt: skip
        exact = (base + change) / factor
        step, least = ROUNDING[found.dtype]
        allowed = step * torch.exp2(exact.abs().clamp_min(least).log2().floor())
        slack = FLOAT32_SLACK * (base.abs() + change.abs().amax()) / factor
        off = float(((found.double() - exact).abs() / (allowed + slack)).max())
        if not off <= 1:
            raise HdlError(
                f"{name} was written {off:.3g} roundings away from base + adapters; nothing was kept. Is the disk or "
                "the memory sound?"
            )
        worst = max(worst, off)
    return Verified([name.removesuffix(".weight") for name in names], worst)
