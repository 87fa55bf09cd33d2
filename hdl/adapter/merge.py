"""Several adapters made one: by sum, which is exact, or by SVD, which is smaller.

The change of a linear is D = sum_i weight_i scale_i B_i A_i. The sum stacks the A_i and the weighted B_i, so that the
ranks add up and nothing is lost. The SVD keeps D's largest singular values; D itself, as large as the linear, is
never made: with thin QRs B = Q_b R_b and A^T = Q_a R_a of the stacked matrices, D has the singular values of the
small R_b R_a^T. No matrix of that rank is nearer to D (Eckart-Young), and what is lost is reported a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdl.adapter.formats import Adapter, Pair
from hdl.adapter.metadata import BASE, LICENSE, TITLE, TRIGGER, describe
from hdl.adapter.stack import check_weight
from hdl.errors import HdlError


@dataclass(frozen=True)
class Part:
    """An adapter in a merge; name: for messages and metadata."""

    name: str
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Truncated:
    """A module after SVD. energy: sum of the kept squared singular values, of all of them."""

    rank: int
    energy: float

    @property
    def error(self) -> float:
        """Frobenius norm of what is lost, of the whole change's."""
        return max(1.0 - self.energy, 0.0) ** 0.5


def stacked(parts: Sequence[Part], module: str, dtype: torch.dtype, device: torch.device | str) -> Pair:
    """One module's sum: A [R, in], B [out, R] with weights and scales in B, R the sum of the ranks; alpha is R."""
    having = [part for part in parts if module in part.adapter.pairs]
    pairs = [part.adapter.pairs[module] for part in having]
    scales = [part.weight * part.adapter.scale(module) for part in having]
    a = torch.cat([pair.a.to(device, dtype) for pair in pairs])
    b = torch.cat([pair.b.to(device, dtype) * scale for pair, scale in zip(pairs, scales)], dim=1)
    return Pair(a, b, float(len(a)))


def modules_of(parts: Sequence[Part]) -> list[str]:
    return sorted({module for part in parts for module in part.adapter.pairs})


def merge_by_sum(parts: Sequence[Part]) -> Adapter:
    """The weighted sum as one adapter in float32, equal to it but for the rounding of the weighted B."""
    _check(parts)
    return Adapter(
        {m: stacked(parts, m, torch.float32, "cpu") for m in modules_of(parts)}, False, _metadata(parts)
    )


def merge_by_svd(
    parts: Sequence[Part], rank: int, device: torch.device | str
) -> tuple[Adapter, dict[str, Truncated]]:
    """The nearest adapter of at most this rank, in float32, and what it keeps of every module.

    Computed in float64 on `device`, a module at a time. A and B share the singular values; alpha is the rank.
    """
    _check(parts)
    if rank < 1:
        raise HdlError(f"rank {rank}: expected 1 or more")
    pairs, kept = {}, {}
    for module in modules_of(parts):
        pair = stacked(parts, module, torch.float64, device)
        u, s, vh = svd(pair.b, pair.a)
        r = min(rank, len(s))
        root = s[:r].sqrt()
        a, b = (root[:, None] * vh[:r]).float().cpu(), (u[:, :r] * root).float().cpu()
        pairs[module] = Pair(a, b, float(r))
        whole = float(s.square().sum())
        kept[module] = Truncated(r, float(s[:r].square().sum()) / whole if whole else 1.0)
    return Adapter(pairs, False, _metadata(parts)), kept


def svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values s [k] and vectors u [out, k], vh [k, in] of b @ a, k the least of rank, out and in."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def refuse_dora(parts: Sequence[Part]) -> None:
    """HdlError for a DoRA: what it changes is W itself, not by a product of low rank that could be added up."""
    for part in parts:
        if part.adapter.dora:
            raise HdlError(
                f"{part.name} is a DoRA, whose change is no B A to add up; merge adapters without DoRA"
            )


def _check(parts: Sequence[Part]) -> None:
    if not parts:
        raise HdlError("no adapters to merge")
    for part in parts:
        check_weight(part.name, part.weight)
    refuse_dora(parts)
    bases = {part.adapter.metadata[BASE]: part.name for part in parts if BASE in part.adapter.metadata}
    if len(bases) > 1:
        raise HdlError(
            f"adapters of different bases do not add up: {', '.join(f'{n}: {b}' for b, n in bases.items())}"
        )
    for module in modules_of(parts):
        shapes = {
            (len(p.b), p.a.shape[1]): part.name
            for part in parts
            if (p := part.adapter.pairs.get(module)) is not None
        }
        if len(shapes) > 1:
            found = ", ".join(f"{name}: {list(shape)}" for shape, name in shapes.items())
            raise HdlError(f"adapters of different shapes do not add up: {module} is {found}")


def _metadata(parts: Sequence[Part]) -> dict[str, str]:
    """Of the whole: every trigger; the base and the license only where all name the same."""
    told = [part.adapter.metadata for part in parts]
    licenses, bases = ({about.get(key) for about in told} for key in (LICENSE, BASE))
    about = describe(
        title=" + ".join(
            f"{part.adapter.metadata.get(TITLE, part.name)} ({part.weight:g})" for part in parts
        ),
        base=bases.pop() if len(bases) == 1 else None,
        trigger=", ".join(about[TRIGGER] for about in told if TRIGGER in about),
        license=licenses.pop() if len(licenses) == 1 else None,
    )
    return about | {"hdl.merged": ", ".join(f"{part.name}:{part.weight:g}" for part in parts)}
