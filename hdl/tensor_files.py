"""Safetensors files as hdl writes them: one tensor at a time, the same bytes every time, whole or not at all.

The safetensors library wants all tensors in memory and writes metadata in the order of a hash map, another one in
every process. Here the header is made from names, dtypes and shapes alone; the tensors' bytes follow as they come.
Format: https://huggingface.co/docs/safetensors - eight bytes of header length, JSON, data without gaps. Larger
elements stand first, so that every tensor starts at a multiple of its element's size, which torch needs to map it.

Nothing is ever unpickled: a file that is no safetensors is refused by what is in it, whatever it is called.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hdl.errors import HdlError

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
CHUNK = 2**24  # bytes copied at once
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # what torch.save writes: a zip, or a bare pickle


@dataclass(frozen=True)
class Kind:
    """What the header says of a tensor. dtype: as spelt there, "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """A tensor of a file: what it is and where its bytes start."""

    kind: Kind
    start: int


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file through safetensors' own reader; HdlError when it is none, without looking inside a pickle."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        if _starts_as_pickle(file):
            raise HdlError(
                f"{file} is a pickle (a .pt, .ckpt or .bin by content), which may run any program when it is read: hdl "
                "never does. Ask for the safetensors file, or convert it where its maker is trusted"
            ) from None
        raise HdlError(
            f"{file}: not readable as safetensors ({error}); is it cut off, or something else?"
        ) from None


def _starts_as_pickle(file: Path) -> bool:
    """Only asked of what is no safetensors: a header's length may begin with the same bytes."""
    if not file.is_file():
        return False
    with open(file, "rb") as raw:
        return raw.read(4).startswith(PICKLE_STARTS)


def places(file: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Where every tensor's bytes are, and the metadata. HdlError for what is no safetensors."""
    with opened(file), open(file, "rb") as raw:  # opened: the library has checked the header
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = Kind(entry["dtype"], tuple(entry["shape"]), end - start)
        found[name] = Place(kind, 8 + length + start)
    return found, metadata


def kind_of(tensor: Tensor) -> Kind:
    return Kind(DTYPES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


def write(
    file: Path,
    kinds: Mapping[str, Kind],
    metadata: Mapping[str, str],
    write_tensor: Callable[[str, BinaryIO], None],
) -> None:
    """Write a file whose tensors come one by one: write_tensor(name, out) is to write kinds[name].size bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    names = sorted(kinds, key=lambda name: (-kinds[name].size // max(kinds[name].elements, 1), name))
    end = 0
    for name in names:
        kind = kinds[name]
        start, end = end, end + kind.size
        header[name] = {"dtype": kind.dtype, "shape": kind.shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            start = out.tell()
            write_tensor(name, out)
            assert out.tell() - start == kinds[name].size, name
        out.flush()
        os.fsync(out.fileno())


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write` for tensors that are there already, on any device."""
    kinds = {name: kind_of(tensor) for name, tensor in tensors.items()}
    write(file, kinds, metadata, lambda name, out: put(tensors[name], out))


def put(tensor: Tensor, out: BinaryIO) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    out.write(data.numpy().data)


def copy(source: BinaryIO, place: Place, out: BinaryIO) -> None:
    """A tensor's bytes as they are."""
    source.seek(place.start)
    left = place.kind.size
    while left:
        data = source.read(min(left, CHUNK))
        out.write(data)
        left -= len(data)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which becomes `out` when all went well and is removed otherwise.

    HdlError when `out` is there already or cannot be written.
    """
    if out.exists():
        raise HdlError(f"{out} is already there and is left as it is; name another output")
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise HdlError(f"{out}: could not be written ({error})") from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
