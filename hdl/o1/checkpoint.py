"""Reading an O1 checkpoint: the published folder, ComfyUI's single file, or random weights of a config.

A `Checkpoint` knows every tensor's name (always as published, `model.…`), shape and place, from the
safetensors headers alone. Tensors are then read one at a time, only those asked for, straight to their
device and dtype; host memory never holds a second copy of the model. Wrong, missing, unknown or cut-off
tensors are found from the headers, before anything is read.

A single file may hold linears in e4m3 with a scale a matrix, as ComfyUI's scaled fp8 has them and
hdl/adapter/into_checkpoint.py writes them: `<linear>.scale_weight` beside `<linear>.weight`, and a marker `scaled_fp8`
for the whole. They are multiplied out while they are read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hdl.errors import HdlError
from hdl.memory.absent import leave_out
from hdl.o1.config import O1Config, read_config
from hdl.o1.decoder import O1
from hdl.seeds import generator_for
from hdl.tensor_files import places

TOKEN_TABLE = "model.language_model.embed_tokens.weight"
INDEX_FILE = "model.safetensors.index.json"
# In the published checkpoint, but never read to train on shards of text embeddings.
UNUSED = ("lm_head.", "model.visual.")
# Of ComfyUI's scaled fp8. scale_input is for products with fp8 activations, which hdl scales itself.
SCALE, MARKER, NOT_READ = "scale_weight", "scaled_fp8", "scale_input"
ROWS_HASHED_AT_ONCE = 8192
SAMPLED = 65_536  # bytes of a tensor, side by side: every place takes a disk a millisecond
MAX_NAMED = 8


@dataclass(frozen=True)
class Entry:
    """Where one tensor is stored and what it is."""

    file: Path
    key: str  # its name inside the file
    shape: tuple[int, ...]
    scale: str | None = None  # name inside the file of what it is to be multiplied with

    def scaled(self, stored: Tensor, opened: Any, dtype: torch.dtype) -> Tensor:
        """What `stored`, the tensor or rows of it on any device, stands for."""
        if self.scale is None:
            return stored.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return (stored.to(wide) * float(opened.get_tensor(self.scale))).to(dtype)


class Checkpoint:
    """A checkpoint on disk. `folder` holds the config and, usually, the tokenizer."""

    def __init__(self, path: Path, folder: Path, entries: dict[str, Entry]) -> None:
        self.path = path
        self.folder = folder
        self.config = read_config(folder / "config.json")
        self.entries = entries
        self._fingerprint: str | None = None
        self._check_names_and_shapes()

    def _check_names_and_shapes(self) -> None:
        expected = expected_shapes(self.config)
        missing = [name for name in expected if name not in self.entries]
        unknown = [n for n in self.entries if n not in expected and not n.startswith(UNUSED)]
        wrong = [
            f"{name} {list(self.entries[name].shape)} (expected {list(shape)})"
            for name, shape in expected.items()
            if name in self.entries and self.entries[name].shape != shape
        ]
        problems = [
            f"{label}: {_some(names)}"
            for label, names in (("missing", missing), ("of another shape", wrong), ("unknown", unknown))
            if names
        ]
        if problems:
            raise HdlError(
                f"{self.path} does not hold the tensors of an O1 as {self.folder / 'config.json'} describes it; "
                + "; ".join(problems)
                + ". Is it the right checkpoint, with its own config, downloaded completely?"
            )

    def read(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """One tensor, in a memory of its own."""
        return next(iter(self.read_all([name], device, dtype)))[1]

    def read_all(
        self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """The named tensors one at a time, file by file; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file, stored in by_file.items():
            with _opened(file) as tensors:
                for name in stored:
                    entry = self.entries[name]
                    mapped = tensors.get_tensor(entry.key)  # pages of the file, not a copy
                    if entry.scale is None:
                        yield name, mapped.to(device, dtype, copy=True)
                    else:
                        yield name, entry.scaled(mapped.to(device), tensors, dtype)

    def token_rows(self, ids: list[int]) -> Tensor:
        """bfloat16 [len(ids), D]: rows of the token table, read without loading the table."""
        entry = self.entries[TOKEN_TABLE]
        with _opened(entry.file) as tensors:
            table = tensors.get_slice(entry.key)
            rows = {i: table[i : i + 1] for i in set(ids)}
            return entry.scaled(torch.cat([rows[i] for i in ids]), tensors, torch.bfloat16)

    def fingerprint(self) -> str:
        """Identifies the base that text embeddings belong to: a hash of its token table in bfloat16.

        The same for the published folder and the single file made from it. The real model's table is 1.2 GB: it is
        read once, however often this is asked.
        """
        if self._fingerprint is None:
            self._fingerprint = self._hash_of_token_table()
        return self._fingerprint

    def _hash_of_token_table(self) -> str:
        entry = self.entries[TOKEN_TABLE]
        digest = hashlib.sha256(str(entry.shape).encode())
        with _opened(entry.file) as tensors:
            table = tensors.get_slice(entry.key)
            for start in range(0, entry.shape[0], ROWS_HASHED_AT_ONCE):
                stored = table[start : start + ROWS_HASHED_AT_ONCE]
                rows = entry.scaled(stored, tensors, torch.bfloat16).contiguous()
                digest.update(rows.view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def decoder_matrices(self) -> list[str]:
        """Names of the weights of the decoder layers' linears."""
        prefix = "model.language_model.layers."
        return [
            name for name, entry in self.entries.items() if name.startswith(prefix) and len(entry.shape) == 2
        ]

    def identity(self, names: Iterable[str]) -> str:
        """Tells these tensors from those of any other checkpoint, without reading all of them.

        A hash of their names, shapes and dtypes, of SAMPLED bytes from the middle of each, and of the size and the time
        of change of each file. Training on other weights changes nearly every number, so that a few show it (16 MB of
        the real model's 14 GB); a file that was changed in place elsewhere has another time. Where it lies and
        what it is called does not matter; a copy without its time counts as another one.
        """
        digest = hashlib.sha256()
        by_file: dict[Path, list[str]] = {}
        for name in sorted(names):
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file in sorted(by_file):
            about = file.stat()
            digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
            stored, _ = places(file)
            with file.open("rb", buffering=0) as opened:
                # Mapped, each place would bring the disk's read-ahead with it: megabytes, the whole file in the end.
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for name in by_file[file]:
                    entry = self.entries[name]
                    for key in filter(None, (entry.key, entry.scale)):
                        kind, start = stored[key].kind, stored[key].start
                        opened.seek(start + max(0, kind.size - SAMPLED) // 2)
                        digest.update(f"{name} {kind.dtype} {kind.shape}".encode())
                        digest.update(opened.read(min(SAMPLED, kind.size)))
        return digest.hexdigest()


class RandomCheckpoint(Checkpoint):
    """Weights that do not exist: drawn from a seed, of the shapes of a folder's config.json.

    Good for measuring speed and memory at a real model's size, never for pictures. Drawn as GPT-2 was
    before training, normal with 0.02, and 0.02/sqrt(2 layers) where a branch ends in the residual stream:
    without that, so deep a stack of random layers is chaotic and amplifies every rounding.
    """

    def __init__(self, folder: Path) -> None:
        shapes = expected_shapes(read_config(folder / "config.json"))
        super().__init__(folder, folder, {name: Entry(folder, name, shape) for name, shape in shapes.items()})

    def read_all(
        self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            weight = torch.empty(self.entries[name].shape, device=device, dtype=dtype)
            if name.endswith("norm.weight"):
                yield name, weight.fill_(1.0)
            else:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if ends_branch else 0.02
                yield name, weight.normal_(0, std, generator=generator_for(name, device=device))

    def token_rows(self, ids: list[int]) -> Tensor:
        dim = self.config.hidden_size
        rows = {i: torch.randn(dim, generator=generator_for(TOKEN_TABLE, i)) * 0.02 for i in set(ids)}
        return torch.stack([rows[i] for i in ids]).to(torch.bfloat16)

    def fingerprint(self) -> str:
        return f"random:{hashlib.sha256(repr(self.config).encode()).hexdigest()}"


def open_checkpoint(
    path: str | Path, config_from: str | Path | None = None, random_init: bool = False
) -> Checkpoint:
    """Open a checkpoint folder or single .safetensors file; nothing but headers is read.

    config_from: the folder that holds config.json and the tokenizer when they are not beside the weights
    (the single file has neither). random_init: `path` is a folder with a config.json, weights are drawn.
    """
    path = Path(path)
    if not path.exists():
        raise HdlError(f"{path}: no such checkpoint; expected a folder or a .safetensors file")
    folder = Path(config_from) if config_from else (path if path.is_dir() else path.parent)
    if not (folder / "config.json").is_file():
        raise HdlError(
            f"{folder}: no config.json there; a single-file checkpoint needs config_from = a folder with the "
            "published config.json and tokenizer files"
        )
    if random_init:
        return RandomCheckpoint(folder)
    entries = _folder_entries(path) if path.is_dir() else _file_entries(path)
    return Checkpoint(path, folder, entries)


def expected_shapes(config: O1Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor hdl uses: the token table and everything in `O1`."""
    with torch.device("meta"):
        model = O1(config)
    shapes = {TOKEN_TABLE: (config.vocab_size, config.hidden_size)}
    return shapes | {name: tuple(p.shape) for name, p in model.named_parameters()}


def load_model(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, absent: bool = False
) -> O1:
    """The model with frozen weights on `device` in `dtype`.

    absent: leave the linears of the decoder's layers in the checkpoint, 6.9 of the real model's 7.0 B numbers,
    for somebody who keeps them in a form of his own (hdl/memory/absent.py).
    """
    with torch.device("meta"):
        model = O1(checkpoint.config)
    if absent:
        prefix = "model.language_model.layers"
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if isinstance(module, nn.Linear):
                leave_out(module, partial(checkpoint.read, f"{name}.weight", device, dtype), device, dtype)
    names = [name for name, _ in model.named_parameters()]
    weights = dict(checkpoint.read_all(names, device, dtype))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _folder_entries(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX_FILE
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise HdlError(
                f"{folder}: expected {INDEX_FILE} or exactly one .safetensors file, found {len(files)}"
            )
        return _file_entries(files[0])
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names_by_file: dict[str, list[str]] = {}
        for name, file in listed.items():
            names_by_file.setdefault(file, []).append(name)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise HdlError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from None
    entries: dict[str, Entry] = {}
    for file, names in names_by_file.items():
        if not (folder / file).is_file():
            raise HdlError(f"{folder / file}: listed in {INDEX_FILE} but not there; download it again")
        found = _file_entries(folder / file)
        absent = [name for name in names if _published_name(name) not in found]
        if absent:
            raise HdlError(f"{folder / file}: {INDEX_FILE} promises tensors it lacks: {_some(absent)}")
        entries |= found
    return entries


def _file_entries(file: Path) -> dict[str, Entry]:
    with _opened(file) as tensors:
        keys = list(tensors.keys())
        scales = _scales(file, tensors, [key for key in keys if _ends(key, SCALE)])
        return {
            _published_name(key): Entry(file, key, tuple(tensors.get_slice(key).get_shape()), scales.get(key))
            for key in keys
            if not any(_ends(key, last) for last in (SCALE, MARKER, NOT_READ))
        }


def _scales(file: Path, tensors: Any, scales: list[str]) -> dict[str, str]:
    """Key of a scaled tensor -> key of its scale. HdlError for a scale that is not one of an e4m3 tensor as a whole."""
    found = {f"{scale.removesuffix(SCALE)}weight": scale for scale in scales}
    there = set(tensors.keys())
    lone = [scale for key, scale in found.items() if key not in there]
    if lone:
        raise HdlError(f"{file}: {_some(lone)} without the weights that they scale; is the file complete?")
    for key, scale in found.items():
        kind, shape = tensors.get_slice(key).get_dtype(), list(tensors.get_slice(scale).get_shape())
        if kind != "F8_E4M3" or math.prod(shape) != 1:
            raise HdlError(
                f"{file}: {key} is {kind} with a scale {shape}; of scaled weights, hdl reads F8_E4M3 with one number a "
                "tensor"
            )
    return found


def _ends(key: str, last: str) -> bool:
    return key.rpartition(".")[2] == last


def _published_name(key: str) -> str:
    """The single file drops `model.`, sometimes in favour of `diffusion_model.`."""
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        key = key.removeprefix(prefix)
    return key if key.startswith(("model.", "lm_head.")) else f"model.{key}"


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise HdlError(
            f"{file}: not readable as safetensors ({error}); is it cut off? Its size is {_size(file)}; "
            "compare it with the original and copy it again"
        ) from None


def _size(file: Path) -> str:
    return f"{file.stat().st_size:,} bytes" if file.is_file() else "unknown"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
