"""cuBLASLt through ctypes: as much of it as hdl.kernels.gemm needs. Names and numbers are cublasLt.h's.

PyTorch offers neither the choice of an algorithm nor every combination of strides, scales and an added
matrix; the library does, and PyTorch has already loaded it.

The library reads matrices column by column, so a row-major matrix is to it the transpose. What it computes
here is therefore out^T = w' x^T (+ plus^T), with w as its first operand and x as its second:

    out = x w^T    w [N, K] looks like [K, N] and is transposed again
    out = x w      w [N, K] looks like [K, N], as needed

One handle and one workspace a device. The workspace is shared by all products, so on each device they must
run one after another: on one stream, or on several that wait for each other, and from one thread at a time.
"""

import ctypes
import ctypes.util
import re
import warnings
from ctypes import (
    POINTER,
    byref,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint16,
    c_uint32,
    c_uint64,
)
from ctypes import c_void_p as Pointer
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 * 2**20
ALIGNMENT = 16  # bytes: what every row must start at
MAX_ALIGNMENT = 256  # the library asks for no more

CUDA_R_32F = 0
CUDA_TYPES = {torch.bfloat16: 14, torch.float8_e4m3fn: 28}
CUBLAS_COMPUTE_32F = 68
CUBLAS_OP_T = 1
CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F = 3
CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2


class Description(IntEnum):
    """cublasLtMatmulDescAttributes_t"""

    TRANSA = 3
    A_SCALE_POINTER = 17
    B_SCALE_POINTER = 18
    FAST_ACCUM = 25
    A_SCALE_MODE = 31
    B_SCALE_MODE = 32


class Preference(IntEnum):
    """cublasLtMatmulPreferenceAttributes_t"""

    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


# cublasLtMatmulAlgoConfigAttributes_t: algorithm, tile, split of K, reduction scheme, swizzling, custom
# option, stages, inner shape, cluster shape. The library insists on each one's exact size.
CONFIG_TYPES = (
    c_int32, c_uint32, c_int32, c_uint32, c_uint32, c_uint32, c_uint32, c_uint16, c_uint16,
)  # fmt: skip


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


# What each function takes; all of these return a cublasStatus_t.
SIGNATURES: dict[str, list[Any]] = {
    "cublasLtCreate": [POINTER(Pointer)],
    "cublasLtMatmulDescCreate": [POINTER(Pointer), c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [Pointer, c_int, Pointer, c_size_t],
    "cublasLtMatmulDescDestroy": [Pointer],
    "cublasLtMatrixLayoutCreate": [POINTER(Pointer), c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatrixLayoutDestroy": [Pointer],
    "cublasLtMatmulPreferenceCreate": [POINTER(Pointer)],
    "cublasLtMatmulPreferenceSetAttribute": [Pointer, c_int, Pointer, c_size_t],
    "cublasLtMatmulPreferenceDestroy": [Pointer],
    "cublasLtMatmulAlgoGetHeuristic": [
        *[Pointer] * 7,
        c_int,
        POINTER(Heuristic),
        POINTER(c_int),
    ],
    "cublasLtMatmulAlgoConfigGetAttribute": [Pointer, c_int, Pointer, c_size_t, Pointer],
    "cublasLtMatmul": [*[Pointer] * 14, c_size_t, Pointer],
}


class CublasLtError(RuntimeError):
    """A call failed."""


class UnsupportedError(CublasLtError):
    """The library does not do that with these matrices; nothing was written."""


UNSUPPORTED = (7, 8, 15)  # CUBLAS_STATUS_INVALID_VALUE, _ARCH_MISMATCH, _NOT_SUPPORTED


@cache
def library() -> ctypes.CDLL | None:
    """The cuBLASLt that PyTorch has loaded, else the system's; None, with a warning, where there is none."""
    path = _loaded_path() or ctypes.util.find_library("cublasLt")
    try:
        if path is None:
            raise OSError("no libcublasLt is loaded or installed")
        loaded = ctypes.CDLL(path)
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes = arguments
            function.restype = c_int
        loaded.cublasLtGetStatusName.argtypes = [c_int]
        loaded.cublasLtGetStatusName.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        warnings.warn(f"matrix products run through PyTorch, some 5 % slower: {error}", stacklevel=2)
        return None
    return loaded


def _loaded_path() -> str | None:
    maps = Path("/proc/self/maps")
    found = re.search(r"(/.*libcublasLt\.so\S*)$", maps.read_text(), re.M) if maps.exists() else None
    return found[1] if found else None


def _lt() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "asked for only where library() found one"
    return loaded


def _must(status: int, what: str) -> None:
    if status:
        kind = UnsupportedError if status in UNSUPPORTED else CublasLtError
        raise kind(f"cuBLASLt refuses {what}: {_lt().cublasLtGetStatusName(status).decode()}")


@cache
def _handle(device: int) -> Pointer:
    handle = Pointer()
    with torch.cuda.device(device):
        _must(_lt().cublasLtCreate(byref(handle)), "a handle")
    return handle


@cache
def _workspace(device: int) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One algorithm for a product. config: the values of CONFIG_TYPES; waves: how often its tiles fill the
    GPU, the last time perhaps in part; algorithm: what `Product.run` takes."""

    config: tuple[int, ...]
    waves: float
    algorithm: Any


class Scales(NamedTuple):
    """float32 [M] and [N], contiguous, of an e4m3 product's rows."""

    x: Tensor
    w: Tensor


class Product:
    """The description of one product, out = x w^T or x w (+ plus), to be run any number of times with
    matrices of the same shapes and strides. `free` it in the end."""

    def __init__(
        self, x: Tensor, w: Tensor, out: Tensor, plus: Tensor | None, transposed: bool, scales: Scales | None
    ) -> None:
        assert x.device.index is not None
        self.device: int = x.device.index
        self.shape = f"x {list(x.shape)} with {'w' if transposed else 'w^T'}, w {list(w.shape)}, {x.dtype}"
        self._matmul = _lt().cublasLtMatmul
        self._handle = _handle(self.device)
        self._workspace = _workspace(self.device).data_ptr()
        self._scales = (0, 0)
        self._beta = byref(c_float(0.0 if plus is None else 1.0))
        self._alpha = byref(c_float(1.0))
        self._description = Pointer()
        _must(
            _lt().cublasLtMatmulDescCreate(byref(self._description), CUBLAS_COMPUTE_32F, CUDA_R_32F),
            "a description",
        )
        if not transposed:
            self._set(Description.TRANSA, c_int32(CUBLAS_OP_T))
        if scales is not None:
            self._set(Description.FAST_ACCUM, c_int8(1))
            self._set(Description.A_SCALE_MODE, c_int32(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F))
            self._set(Description.B_SCALE_MODE, c_int32(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F))
            self._take(scales)
        self._w, self._x, self._out = _layout(w), _layout(x), _layout(out)
        self._plus = _layout(out if plus is None else plus)

    def _set(self, attribute: Description, value: Any) -> None:
        status = _lt().cublasLtMatmulDescSetAttribute(
            self._description, attribute, byref(value), ctypes.sizeof(value)
        )
        _must(status, f"{attribute.name} of a product")

    def _take(self, scales: Scales) -> None:
        w, x = scales.w.data_ptr(), scales.x.data_ptr()
        if (w, x) != self._scales:  # the allocator gives the same addresses step by step: often nothing to do
            self._set(Description.A_SCALE_POINTER, Pointer(w))
            self._set(Description.B_SCALE_POINTER, Pointer(x))
            self._scales = (w, x)

    def candidates(self, count: int, alignment: int) -> list[Candidate]:
        """Up to `count` algorithms, the one expected to be fastest first; none where none can do it.

        alignment: bytes, of every matrix's first element. Splits of K are summed in float32 only.
        """
        lt = _lt()
        preference = Pointer()
        _must(lt.cublasLtMatmulPreferenceCreate(byref(preference)), "a preference")
        wishes = [
            (Preference.MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE_BYTES)),
            (Preference.REDUCTION_SCHEME_MASK, c_uint32(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)),
            (Preference.MIN_ALIGNMENT_A_BYTES, c_uint32(alignment)),
            (Preference.MIN_ALIGNMENT_B_BYTES, c_uint32(alignment)),
            (Preference.MIN_ALIGNMENT_C_BYTES, c_uint32(alignment)),
            (Preference.MIN_ALIGNMENT_D_BYTES, c_uint32(alignment)),
        ]
        for wish, value in wishes:
            status = lt.cublasLtMatmulPreferenceSetAttribute(
                preference, wish, byref(value), ctypes.sizeof(value)
            )
            _must(status, wish.name)
        found = (Heuristic * count)()
        returned = c_int(0)
        status = lt.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._description, self._w, self._x, self._plus, self._out,
            preference, count, found, byref(returned),
        )  # fmt: skip
        lt.cublasLtMatmulPreferenceDestroy(preference)
        usable = [h for h in found[: returned.value] if h.state == 0] if status == 0 else []
        return [Candidate(_config(h.algorithm), h.waves, _kept(h.algorithm)) for h in usable]

    def run(
        self, algorithm: Any, x: Tensor, w: Tensor, out: Tensor, plus: Tensor | None, scales: Scales | None
    ) -> None:
        """Fill out. x's device must be the current one. UnsupportedError, CublasLtError: see there."""
        if scales is not None:
            self._take(scales)
        status = self._matmul(
            self._handle,
            self._description,
            self._alpha,
            w.data_ptr(),
            self._w,
            x.data_ptr(),
            self._x,
            self._beta,
            (out if plus is None else plus).data_ptr(),
            self._plus,
            out.data_ptr(),
            self._out,
            algorithm,
            self._workspace,
            WORKSPACE_BYTES,
            torch.cuda.current_stream(self.device).cuda_stream,
        )
        if status:
            _must(status, self.shape)

    def free(self) -> None:
        """Give the descriptions back; what was started with them goes on."""
        for layout in (self._w, self._x, self._out, self._plus):
            _lt().cublasLtMatrixLayoutDestroy(layout)
        _lt().cublasLtMatmulDescDestroy(self._description)


def row_stride(matrix: Tensor) -> int:
    """Elements from row to row; a lone row's stride says nothing, since torch may give any."""
    rows, columns = matrix.shape
    aligned = ALIGNMENT // matrix.element_size()
    return matrix.stride(0) if rows > 1 else -(-columns // aligned) * aligned


def takes(matrix: Tensor) -> bool:
    """Whether the library takes it: not empty, elements adjacent, rows apart and aligned."""
    rows, columns = matrix.shape
    stride = row_stride(matrix)
    adjacent = columns == 1 or matrix.stride(1) == 1
    aligned = (matrix.data_ptr() | stride * matrix.element_size()) % ALIGNMENT == 0
    return rows > 0 and columns > 0 and adjacent and stride >= columns and aligned


def _layout(matrix: Tensor) -> Pointer:
    rows, columns = matrix.shape
    layout = Pointer()
    status = _lt().cublasLtMatrixLayoutCreate(
        byref(layout), CUDA_TYPES[matrix.dtype], columns, rows, row_stride(matrix)
    )
    _must(status, f"a matrix {list(matrix.shape)} with strides {matrix.stride()}")
    return layout


def _config(algorithm: Algorithm) -> tuple[int, ...]:
    values = []
    for attribute, kind in enumerate(CONFIG_TYPES):
        value = kind()
        written = c_size_t()
        status = _lt().cublasLtMatmulAlgoConfigGetAttribute(
            byref(algorithm), attribute, byref(value), ctypes.sizeof(value), byref(written)
        )
        _must(status, f"attribute {attribute} of an algorithm")
        values.append(value.value)
    return tuple(values)


def _kept(algorithm: Algorithm) -> Any:
    """A copy, by reference: the array that the heuristic filled need not live on."""
    return byref(Algorithm.from_buffer_copy(algorithm))
