"""Which of fp8's roundings move a model's numbers: one kind of operand at a time goes to e4m3 and back.

The products themselves are the bfloat16 path's (float32's on a CPU), so what is seen is the rounding of
weights, of the products' inputs or of their gradients alone, and in some of the layers or linears only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from hdl.bench.exactness import Answer, adapted_model, compare, take_step
from hdl.config import Lora
from hdl.data.samples import Sample
from hdl.kernels.fuse import fuse_with
from hdl.kernels.gemm import product, product_transposed
from hdl.kernels.linears import Buffer, FullLinear
from hdl.kernels.quantize import Rowwise, empty_rows, quantize_rows, quantize_weight
from hdl.o1.checkpoint import Checkpoint

OPERANDS = frozenset({"weights", "inputs", "gradients"})
PACKS = ("qkv", "o", "gate_up", "down")  # in the order in which a layer's linears are packed


@dataclass
class Rounding:
    """What is rounded now: operands, and in which (layer, pack)."""

    operands: frozenset[str] = frozenset()
    where: Callable[[int, str], bool] = lambda layer, pack: True
    places: list[tuple[int, str]] = field(default_factory=list)  # of the linears made so far

    def packed(self, modules: list[nn.Module]) -> "RoundedLinear":
        self.places.append((len(self.places) // len(PACKS), PACKS[len(self.places) % len(PACKS)]))
        return RoundedLinear(modules, self, self.places[-1])


class RoundedLinear(FullLinear):
    def __init__(self, modules: Sequence[nn.Module], rounding: Rounding, place: tuple[int, str]) -> None:
        super().__init__(modules)
        self.rounding, self.place = rounding, place

    def forward(self, x: Buffer, plus: Tensor | None = None) -> Tensor:
        wide = x.wide
        if self._rounds("inputs"):
            wide = torch.cat([quantize_rows(x.values).dequantize().to(wide.dtype), x.low], dim=1)
        return product(wide, self._matrix()[: self.n], plus=plus)

    def backward(self, dy: Buffer) -> Tensor:
        wide = dy.wide
        if self._rounds("gradients"):
            scale = self._weight().scale
            rounded = quantize_rows(dy.values, column_scale=scale).dequantize() / scale
            wide = torch.cat([rounded.to(wide.dtype), dy.low], dim=1)
        return product_transposed(wide, self._matrix()[:, : self.k])

    def _rounds(self, operand: str) -> bool:
        return operand in self.rounding.operands and self.rounding.where(*self.place)

    def _matrix(self) -> Tensor:
        if not self._rounds("weights"):
            return self.matrix
        matrix = self.matrix.clone()
        matrix[: self.n, : self.k] = self._weight().dequantize().to(matrix.dtype)
        return matrix

    def _weight(self) -> Rowwise:
        rows = empty_rows(self.n, self.k, self.matrix.device)
        for member in self.members:
            own = Rowwise(rows.values[member.rows], rows.scale[member.rows])
            quantize_weight(self.matrix[member.rows, : self.k], own)
        return rows


@dataclass(frozen=True)
class Moved:
    """How far a case is from no rounding: of x_pred relative, cosines of the adapter's matrices, and how many
    of these are below 0.99."""

    rounded: str
    x_pred: float
    lowest_cosine: float
    mean_cosine: float
    below: int
    matrices: int


def cases(layers: int) -> dict[str, tuple[frozenset[str], Callable[[int, str], bool]]]:
    """By name: operands, and where. The parts of the stack are an 8th and a third of its layers."""
    eighth, third = max(layers // 8, 1), max(layers // 3, 1)
    return {
        "weights, inputs and gradients": (OPERANDS, lambda layer, pack: True),
        **{f"{name} alone": (frozenset({name}), lambda layer, pack: True) for name in sorted(OPERANDS)},
        "all, but not in q, k, v": (OPERANDS, lambda layer, pack: pack != "qkv"),
        f"all, but not in the first {eighth} layers": (OPERANDS, lambda layer, pack: layer >= eighth),
        f"all, in the first {third} layers alone": (OPERANDS, lambda layer, pack: layer < third),
    }


def moved_by_rounding(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    lora: Lora,
    sigma: float,
    device: torch.device,
    seed: int,
) -> Iterator[Moved]:
    """Every case against the same model without rounding."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: PeftModel = adapted_model(checkpoint, lora, device, dtype, seed)
    rounding = Rounding()
    fuse_with(model, rounding.packed, "everything")

    def answer() -> Answer:
        return take_step(model, samples, sigma, device, dtype, seed)

    exact = answer()
    for name, (rounding.operands, rounding.where) in cases(checkpoint.config.num_hidden_layers).items():
        x_pred, cosines = compare(answer(), exact)
        values = list(cosines.values())
        below = sum(c < 0.99 for c in values)
        yield Moved(name, x_pred, min(values), sum(values) / len(values), below, len(values))
