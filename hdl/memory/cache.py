"""Frozen weights on disk in the form in which they are used: one start makes them, the next ones read them.

A folder for every base and form, in it a safetensors file for every decoder layer:

    CACHE/e4m3-0123456789abcdef/layer-07.safetensors        self_attn.q_proj.values, self_attn.q_proj.scale, ...

What is kept is what the packed linears hold (hdl/kernels/linears.py, restored.py), linear by linear, so that one
folder serves e4m3 that is kept once or twice, resident or streamed, for any adapter. Every file stands for itself: it
is written under another name and renamed when it is complete, and its header has the base's identity and a
checksum of every tensor, which is asked of what has arrived on the device. A file that is not there, cut off, of
another base or damaged is made from the base again: nothing is ever trained on weights that were not checked.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1  # of the files
# What of model.weights is the same on disk; the others are read as they are.
FORMS = {"fp8": "e4m3", "fp8_once": "e4m3", "fp8_stored": "e4m3", "nf4": "nf4"}
DAY = 86400  # seconds
Parts = Mapping[str, Tensor]  # of a linear, by name


class WeightCache:
    """The files of one base in one form. read, made: layers that came from here, and from the base."""

    def __init__(self, folder: Path, form: str, base: str) -> None:
        """base: what identifies the base's weights and everything that they go through."""
        self.form, self.base = form, f"{FORMAT} {form} {base}"
        self.folder = folder / f"{form}-{_digest(self.base)[:16]}"
        self.read, self.made = set[int](), set[int]()
        self.writable = True

    def attach(self, linears: Sequence[Mapping[str, nn.Linear]], writes: Sequence[bool]) -> None:
        """Let the weights of these linears, layer by layer and by name, be filled (`fill`) from here.

        writes: by layer, whether this process is the one to write what is not there."""
        if any(writes):
            self._clear_up()
        for i, (named, mine) in enumerate(zip(linears, writes, strict=True)):
            layer = _Layer(self, i, list(named), mine)
            for name, linear in named.items():
                linear.filled_by = _Linear(layer, name)  # type: ignore[assignment]

    def file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:02d}.safetensors"

    def write(self, layer: int, tensors: dict[str, Tensor], sums: dict[str, str]) -> None:
        """Complete or not at all; that it cannot be is said once, and no reason to stop."""
        if not self.writable:
            return
        file = self.file(layer)
        part = file.with_name(f".{file.stem}-{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata={"base": self.base, "sums": json.dumps(sums)})
            part.chmod(0o644)  # weights that anybody may read: safetensors gives them to their writer alone
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            self.writable = False
            print(f"model.cache: {file} could not be written ({error}); the next start makes it again")
        finally:
            part.unlink(missing_ok=True)

    def _clear_up(self) -> None:
        """Remove what runs that were killed while writing have left."""
        for part in self.folder.glob(".layer-*.part"):
            try:
                if time.time() - part.stat().st_mtime > DAY:
                    part.unlink()
            except OSError:
                continue  # somebody else's, or gone


def made_with(form: str, dtype: torch.dtype, device: torch.device) -> str:
    """What else decides the bits, beside the base's weights: the dtype that they are read in, and who rounds them."""
    by = f"{device.type}, bitsandbytes {version('bitsandbytes')}" if form == "nf4" else device.type
    return f"{dtype} on {by}"


def fill(linear: nn.Linear, parts: Parts, make: Callable[[], object]) -> None:
    """Bring a linear's weight into `parts`: as `make` does it, or as it did once if the linear has a cache."""
    filled_by: _Linear | None = linear.__dict__.pop("filled_by", None)
    if filled_by:
        filled_by.fill(parts, make)
    else:
        make()


class _Linear:
    def __init__(self, layer: "_Layer", name: str) -> None:
        self.layer, self.name = layer, name

    def fill(self, parts: Parts, make: Callable[[], object]) -> None:
        named = {f"{self.name}.{part}": tensor for part, tensor in parts.items()}
        if self.layer.read(named):
            return
        make()
        self.layer.add(self.name, named)


class _Layer:
    """One file."""

    def __init__(self, cache: WeightCache, number: int, linears: Sequence[str], writes: bool) -> None:
        self.cache, self.number, self.writes = cache, number, writes
        self.missing = set(linears)  # until all are here, for the file
        self.tensors: dict[str, Tensor] = {}
        self.sums: dict[str, str] = {}
        self.usable: bool | None = None  # not looked at yet

    @property
    def path(self) -> Path:
        return self.cache.file(self.number)

    def read(self, named: Parts) -> bool:
        """Fill the tensors from the file, if it is sound."""
        if self.usable is False:
            return False
        problem = None
        try:
            if self.usable is None:
                self._announce()
            with safe_open(self.path, framework="pt", device="cpu") as stored:
                about = stored.metadata() or {}
                if about.get("base") != self.cache.base:
                    problem = "is of another base"
                else:
                    problem = _fill(named, stored, json.loads(about["sums"]))
        except FileNotFoundError:
            self.usable = False
            return False
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            problem = f"is not readable ({type(error).__name__}: {error})"
        if problem:
            print(f"model.cache: {self.path} {problem}; its layer is made from the base again")
            if self.usable:  # some of its weights have been taken from it: it is for the next start to make
                self.writes = False
                self.path.unlink(missing_ok=True)
        self.usable = problem is None
        if self.usable:
            self.cache.read.add(self.number)
        return self.usable

    def add(self, linear: str, made: Parts) -> None:
        """Keep what was made, and write the file once all of the layer was."""
        self.cache.read.discard(self.number)
        self.cache.made.add(self.number)
        if not self.writes or not self.cache.writable:
            return
        for name, tensor in made.items():
            self.sums[name] = checksum(tensor)
            self.tensors[name] = tensor.to("cpu", copy=True).contiguous()
        self.missing.discard(linear)
        if not self.missing:
            self.cache.write(self.number, self.tensors, self.sums)
            self.tensors = {}

    def _announce(self) -> None:
        """Let the disk begin with this file and the next one: it is read in pieces, and not by many at once."""
        for file in (self.path, self.cache.file(self.number + 1)):
            try:
                handle = os.open(file, os.O_RDONLY)
            except OSError:
                continue
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(handle)


def _fill(named: Parts, stored: Any, sums: Mapping[str, str]) -> str | None:
    """Bring the stored tensors in; what is wrong with them, if anything is."""
    for name, tensor in named.items():
        found = stored.get_tensor(name)
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            return f"has {name} as {found.dtype} {list(found.shape)}"
        tensor.copy_(found)
        if checksum(tensor) != sums[name]:
            return f"is damaged ({name} has another checksum than when it was written)"
    return None


def checksum(tensor: Tensor) -> str:
    """Of a tensor's bytes, computed where it is, at the speed of its memory: the sum of its 8-byte words, and that
    of the words times their places, both modulo 2^64. Against damage, not against malice."""
    numbers = tensor.contiguous().flatten().view(torch.uint8)
    words = nn.functional.pad(numbers, (0, -len(numbers) % 8)).view(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device)
    sums = torch.stack([words.sum(), (words * places).sum()]).tolist()
    return "-".join(f"{value % 2**64:016x}" for value in sums)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
