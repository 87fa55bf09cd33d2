"""Being asked to stop: SIGTERM and SIGUSR1 end a run after the step it is at, saved.

The ranks get the signal at different moments, or only some of them do. Whoever has it says so in the numbers that all
ranks add up in every step anyway (hdl/engine/step.py), so all of them stop after the same step. The process then
leaves with REQUEUE, and the run's folder has a file `requeue`: torchrun, which ends with 1 whatever its workers
say, does not hide that. Before the first step there is nothing to save, and a process leaves at once.

torchrun passes SIGTERM on to its workers and kills them 30 s later (TORCH_ELASTIC_SHUTDOWN_TIMEOUT: other seconds);
SIGUSR1 it passes on with --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1, and dies of it without.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

REQUEUE = 85  # exit status: asked to stop, saved, to be started again with --resume auto
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """Notes that one of SIGNALS has come, while it is entered; of the main thread."""

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        self.stepping = False  # the run has come to its steps, and will look at `asked`
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if not self.stepping:
            os.write(2, f"{self.asked}: stopped before the first step\n".encode())
            os._exit(REQUEUE)
