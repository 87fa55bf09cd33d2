"""The samplers of the two published variants, as the model's own code runs them.

A scheduler is told the velocity v = (x_pred - z) / sigma at each of its `timesteps` (0..999, integers)
and moves z to the next noise level. z may be any packed [P, 3072]: nothing here mixes patches.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from hdl.flow.sigma import shift_sigma

# dev's 28 fixed steps
DEV_TIMESTEPS = (
    999, 987, 974, 960, 945, 929, 913, 895, 877, 857, 836, 814, 790, 764,
    737, 707, 675, 640, 602, 560, 515, 464, 409, 347, 278, 199, 110, 8,
)  # fmt: skip


class Scheduler(Protocol):
    timesteps: list[int]
    stochastic: bool  # whether `step` uses its noise

    def step(self, i: int, v: Tensor, z: Tensor, noise: Tensor | None) -> Tensor:
        """z at step i, the velocity there, and (clipped) standard normal noise like z -> z at step i + 1."""


class UniPC:
    """full: diffusers' UniPC (order 2, bh2) on O1's own grid, which is shifted twice.

    With s(x) = shift x / (1 + (shift - 1) x), the n sigmas are s(linspace(s(0.999), 0, n + 1)[:-1]), then
    0. The solver uses these; the model's timestep is the integer part of 1000 sigma.
    """

    stochastic = False

    def __init__(self, steps: int, shift: float) -> None:
        top = float(shift_sigma(torch.tensor(0.999, dtype=torch.float64), shift))
        grid = shift_sigma(torch.linspace(top, 0.0, steps + 1, dtype=torch.float64)[:-1], shift)
        self.timesteps = [int(1000 * sigma) for sigma in grid.tolist()]
        solver: Any = UniPCMultistepScheduler(  # typed loosely: diffusers wraps the class at run time
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
        )
        solver.set_timesteps(steps)  # sets the solver's state up; its grid is replaced next
        solver.sigmas = torch.cat([grid, grid.new_zeros(1)]).float()
        solver.timesteps = torch.tensor(self.timesteps)
        solver.set_begin_index(0)
        self._solver = solver

    def step(self, i: int, v: Tensor, z: Tensor, noise: Tensor | None) -> Tensor:
        return self._solver.step(-v, self._solver.timesteps[i], z, return_dict=False)[0]


class Flash:
    """dev: predict x0, then jump to the next noise level with fresh noise, clipped by the caller per picture."""

    stochastic = True

    def __init__(self, noise_scale: float) -> None:
        self.timesteps = list(DEV_TIMESTEPS)
        self.noise_scale = noise_scale

    def step(self, i: int, v: Tensor, z: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        sigma, sigma_next = _sigma_at(self.timesteps, i), _sigma_at(self.timesteps, i + 1)
        x0 = z + sigma * v
        return sigma_next * self.noise_scale * noise + (1.0 - sigma_next) * x0


class FlowMatchEuler:
    """Plain Euler: dz/dsigma = -v. timesteps: dev's, unless others are given."""

    stochastic = False

    def __init__(self, timesteps: Sequence[int] = DEV_TIMESTEPS) -> None:
        self.timesteps = list(timesteps)

    def step(self, i: int, v: Tensor, z: Tensor, noise: Tensor | None) -> Tensor:
        return z + (_sigma_at(self.timesteps, i) - _sigma_at(self.timesteps, i + 1)) * v


def _sigma_at(timesteps: list[int], i: int) -> float:
    return timesteps[i] / 1000 if i < len(timesteps) else 0.0
