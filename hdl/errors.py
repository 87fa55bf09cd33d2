"""The one kind of error a user is meant to read.

Everything that can be wrong with what a person gave us (a file, an option, a folder, a machine) is
raised as `HdlError` with a message that says what was found, where, what was expected and what to do.
Anything else that escapes is a bug in hdl and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable


class HdlError(Exception):
    """Bad input or a machine that cannot do what was asked; the message is written for the user.

    on_all_ranks: every rank of a job raises this very error, so that one of them telling is enough.
    """

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


DRIVERS_WORDS = (
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it followed upon, was a GPU's lack of memory: the allocator's, or the driver's when it makes
    a graph, loads or launches a kernel, for which PyTorch has no error of its own. The end of a capture hides what broke
    it off."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in DRIVERS_WORDS):
            return True
        error = error.__context__
    return False


def command_line(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and leave with its exit status; an `HdlError` becomes one line and status 1."""
    try:
        status = main()
    except HdlError as error:
        if not error.on_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
