"""How a process ends when its job cannot go on: at once, whatever its main thread waits for.

A process whose torchrun is gone would train on by itself, or wait for ever for the others. From before the group is
joined until the end, a thread looks after that.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LONGEST = 10.0  # seconds for the last duties
last_duties: list[Callable[[], object]] = []  # what is done before, of a run that has begun


def follow_torchrun() -> None:
    """End this process when the torchrun that started it has ended; without one, do nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent and not _is_nobody(parent):
            time.sleep(0.5)
        first = os.environ.get("LOCAL_RANK") == "0"  # one of a machine's ranks tells
        end(f"torchrun (process {parent} on {socket.gethostname()}) is gone" if first else None)

    threading.Thread(target=follow, name="follow torchrun", daemon=True).start()


def _is_nobody(parent: int) -> bool:
    """Whether torchrun ended before it could be followed: its children then are the first process's, which in a
    container may be torchrun itself."""
    return parent == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes()


def end(message: str | None) -> NoReturn:
    """Say what there is to say, see to the last duties, leave with status 1."""
    if message:
        sys.stdout.flush()
        os.write(
            2,
            f"\nerror: {message}; the job ends, and --resume auto goes on from its last checkpoint\n".encode(),
        )
    duties = threading.Thread(target=lambda: [duty() for duty in last_duties], daemon=True)
    duties.start()
    duties.join(LONGEST)
    os._exit(1)
