"""Which of a run's adapters is the best, and when it has stopped getting better.

An adapter's score at a validation is gate - lambda * drift: how much more of the look its pictures have with the
trigger than without it, less lambda times its relative drift (hdl/metrics/drift.py). The best one so far lies in
`best/`, and its numbers beside it in best.json. That file is all there is to remember: a resumed run reads it, and comes to
the same numbers again where it takes steps again.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hdl.errors import HdlError

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Judged:
    """A validation after `step` steps. drift: relative to the change."""

    step: int
    score: float
    gate: float
    drift: float


def judged(step: int, gate: float, drift: float, drift_weight: float) -> Judged:
    return Judged(step, gate - drift_weight * drift, gate, drift)


def read_best(folder: Path) -> Judged | None:
    """What a run's folder of the best adapter says of it; None where there is none yet. HdlError where it says nothing
    of the kind."""
    file = folder / BEST_FILE
    try:
        return Judged(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise HdlError(
            f"{file} is damaged ({error}); move {folder} away, and the best is found anew"
        ) from None


def best_text(best: Judged) -> str:
    """Of best.json."""
    return json.dumps(asdict(best)) + "\n"


def is_over(best: Judged | None, step: int, every: int, stop_after: int | None) -> bool:
    """Whether `stop_after` validations, one every so many steps, have come since the best one's."""
    return best is not None and stop_after is not None and step - best.step >= stop_after * every
