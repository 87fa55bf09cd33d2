"""Adapters made up for the tiny golden checkpoint."""

import torch

from hdl.adapter.formats import Adapter, Pair
from hdl.adapter.names import linears
from hdl.o1.checkpoint import Checkpoint


def made_up(
    base: Checkpoint,
    seed: int = 0,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    dtype: torch.dtype = torch.float32,
    only: str = ".language_model.layers.",
    rslora: bool = False,
    odd: bool = False,
    **metadata: str,
) -> Adapter:
    """Random A and B on every linear whose name holds `only`; odd: some with a rank and an alpha of their own."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for i, (module, (out, into)) in enumerate(sorted(linears(base).items())):
        if only in module:
            r, scale = (rank + 1, alpha / 3) if odd and i % 5 == 0 else (rank, alpha)
            a = torch.randn(r, into, generator=generator) / into**0.5
            b = torch.randn(out, r, generator=generator) * 0.3
            pairs[module] = Pair(a.to(dtype), b.to(dtype), scale)
    return Adapter(pairs, rslora, metadata)


def same(first: Adapter, second: Adapter) -> bool:
    """To the bit, dtypes included."""
    return (first.rslora, first.pairs.keys()) == (second.rslora, second.pairs.keys()) and all(
        one.alpha == two.alpha
        and one.a.dtype == two.a.dtype
        and torch.equal(one.a, two.a)
        and one.b.dtype == two.b.dtype
        and torch.equal(one.b, two.b)
        for one, two in zip(first.pairs.values(), second.pairs.values())
    )
