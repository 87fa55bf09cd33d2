"""What the kernels' tests share: a device, awkward tensors, and how far a result may be off."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hdl.kernels.quantize import E4M3_MAX, Rowwise, empty_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


class Slice:
    """Columns of a wider matrix of nan: what is read or written beside them shows."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.wide = torch.full((rows, columns + 24), torch.nan, dtype=dtype, device=DEVICE)
        self.view = self.wide[:, 8 : 8 + columns]

    def assert_untouched_beside(self) -> None:
        columns = self.view.shape[1]
        assert self.wide[:, :8].isnan().all() and self.wide[:, 8 + columns :].isnan().all()


def sliced(x: Tensor) -> Tensor:
    """The same numbers as x [S, D] or [S, heads, d], rows lying apart in a wider buffer of nan."""
    rows = x.flatten(1)
    into = Slice(*rows.shape, x.dtype).view
    into.copy_(rows)
    return into.unflatten(1, x.shape[1:]) if x.ndim == 3 else into


def poisoned_rows(rows: int, columns: int) -> Rowwise:
    """Room for quantized rows that holds nan."""
    into = empty_rows(rows, columns, DEVICE)
    into.values.view(torch.uint8).fill_(0x7F)
    into.scale.fill_(torch.nan)
    return into


class RowsSlice:
    """Room for quantized rows in columns of a wider matrix; all of it holds nan."""

    def __init__(self, rows: int, columns: int) -> None:
        self.wide = poisoned_rows(rows, columns + 24)
        self.rows = self.wide.columns(8, 8 + columns)

    def assert_untouched_beside(self) -> None:
        beside = self.wide.values.view(torch.uint8)
        end = 8 + self.rows.values.shape[1]
        assert (beside[:, :8] == 0x7F).all() and (beside[:, end:] == 0x7F).all()


def distance(got: Tensor, exact: Tensor) -> float:
    """Relative distance to a float64 result; 0 / 0 is 0."""
    assert got.shape == exact.shape and exact.dtype == torch.float64
    norm = exact.norm()
    return float((got.double() - exact).norm() / (norm if norm > 0 else 1.0))


def assert_close(got: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
    """float32: 1e-5. bfloat16: 1.5 times the distance of `plain`, the same in PyTorch's bfloat16."""
    error = distance(got, exact)
    if got.dtype == torch.float32:
        assert error <= 1e-5, error
    else:
        assert plain is not None and plain.dtype == torch.bfloat16
        assert error <= 1.5 * distance(plain, exact), (error, distance(plain, exact))
        assert error <= 4e-3, error  # rounding once to 8 bits costs at most 2^-8 = 3.9e-3


def assert_quantizes(rows: Rowwise, exact: Tensor) -> None:
    """Each number is the nearest e4m3 one for its row's scale; exact: float64 [S, D].

    float32 arithmetic is left 1e-4 of the number (rounding to bfloat16 on the way would cost up to 4e-3) and
    3e-7 of the row's largest, which sums and differences within the row may lose.
    """
    peak = exact.abs().amax(1)
    zero = peak == 0
    assert rows.values.shape == exact.shape and rows.scale.isfinite().all() and (rows.scale > 0).all()
    assert (rows.values[zero].float() == 0).all()
    torch.testing.assert_close(rows.scale.double()[~zero], peak[~zero] / E4M3_MAX, rtol=1e-5, atol=0.0)
    scaled = exact / rows.scale.double()[:, None]
    step = torch.exp2(scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    slack = 1e-4 * scaled.abs() + 3e-7 * E4M3_MAX
    assert ((rows.values.double() - scaled).abs() <= step / 2 + slack).all()


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """What autograd makes of `upstream`, for each input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*inputs), inputs, upstream))


def round_like_hardware() -> None:
    """Make Triton's interpreter convert between float types as a GPU does.

    Its own conversion cuts bfloat16 off instead of rounding, forgets to carry into the exponent when it
    rounds to e4m3 (1.97 becomes 1), and turns nan into a number there.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    names = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    theirs = interpreter._convert_float

    def convert(array: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if source not in names or target not in names:
            return theirs(array, source, target, rounding)
        bits = np.ascontiguousarray(array).view(f"int{source.primitive_bitwidth}")
        numbers = torch.from_numpy(bits).view(names[source])
        if target == tl.float8e4nv:
            numbers = numbers.clamp(-E4M3_MAX, E4M3_MAX)
        out = numbers.to(names[target]).view(getattr(torch, f"int{target.primitive_bitwidth}"))
        return out.numpy().view(f"uint{target.primitive_bitwidth}")

    interpreter._convert_float = convert
