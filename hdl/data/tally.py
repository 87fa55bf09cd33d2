"""What was drawn, to hold against the mixture that was asked for."""

import numpy as np

from hdl.data.mixture import Mixture


class Tally:
    """Counts the draws of a mixture's parts: its sources and the tags with multipliers."""

    def __init__(self, mixture: Mixture) -> None:
        self._parts = mixture.parts()
        self._drawn = dict.fromkeys(self._parts, 0)
        self.draws = 0

    def add(self, samples: np.ndarray) -> None:
        self.draws += len(samples)
        for name, part in self._parts.items():
            self._drawn[name] += int(part[samples].sum())

    def shares(self) -> dict[str, float]:
        """Of all draws, the share of each part."""
        return {name: drawn / max(self.draws, 1) for name, drawn in self._drawn.items()}

    def describe(self) -> str:
        """One line; empty where there is only one part."""
        shares = ", ".join(f"{name} {share:.2%}" for name, share in self.shares().items())
        return f"mixture drawn, of {self.draws:,} draws: {shares}" if shares else ""
