"""AdamW for weights that exist in bfloat16 only: steps in float32, kept by stochastic rounding.

The nearest bfloat16 is up to 0.4 % of a weight away, and most steps of a training are smaller: rounded to
nearest they would leave the weight where it is, however many there are. Rounded up or down at random, with
probabilities as the distances, a weight moves by the right amount on average: E[round(x)] = x.

The random bits are a pure function of (seed, step, place in the adapter). They are drawn in pieces of the
whole adapter, so that they are the same whichever rank holds a place.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hdl.seeds import generator_for

PIECE = 2**22  # weights that are stepped at a time: what that takes for a moment is at most 80 MiB


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to one of the two nearest bfloat16, such that the mean over all `bits` is x.

    bits: int32 in [0, 2^16), of x's shape. bfloat16 is the upper half of a float32. The lower half, in
    units of 2^16, is how far x has come to the next bfloat16 away from zero: adding uniform bits carries into
    the upper half with just that probability, then the lower half is cut off. What bfloat16 can hold stays
    as it is, infinities too; NaN stays NaN; above the largest bfloat16, the next one is infinity.
    """
    upper = (x.view(torch.int32) + bits).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(x.isnan(), x, upper).bfloat16()


class RoundingAdamW(torch.optim.Optimizer):
    """torch's AdamW on bfloat16 parameters, with float32 moments.

    Parameters may be partitions of equal size, of which this rank holds number `rank`: ZeRO's.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *,
        lr: float, betas: tuple[float, float], weight_decay: float, seed: int, rank: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        self.seed, self.rank = seed, rank

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradient is that of the last backward"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0  # on the host, which seeds with it
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
        weights, gradients = parameter.view(-1), parameter.grad.view(-1)  # type: ignore[union-attr]
        moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        first = self.rank * len(weights)  # places in the adapter
        end = first + len(weights)
        for piece in range(first // PIECE, math.ceil(end / PIECE)):
            drawn = self._bits(state["step"], piece, parameter.device)
            start, stop = max(first, piece * PIECE), min(end, (piece + 1) * PIECE)
            here = slice(start - first, stop - first)
            x = weights[here].float()
            adamw(
                [x], [gradients[here].float()], [moments[0][here]], [moments[1][here]], [],
                [torch.full((), state["step"], dtype=torch.float32, device=x.device)], fused=True,
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
            weights[here] = round_stochastically(x, drawn[start - piece * PIECE : stop - piece * PIECE])
        state["step"] += 1

    def _bits(self, step: int, piece: int, device: torch.device) -> Tensor:
        random = generator_for(self.seed, "rounding", step, piece, device=device)
        return torch.randint(0, 2**16, (PIECE,), dtype=torch.int32, device=device, generator=random)
