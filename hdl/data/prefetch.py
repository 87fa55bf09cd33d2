"""Doing things ahead in the background, a few at once, in an order that can be set anew at any time."""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

AT_ONCE = 4


class Ahead:
    """Calls `do` with names, in order. Its threads end when there is nothing left, so there is nothing to close;
    they are daemons, so that an exit does not wait for them. Works in a forked process too."""

    def __init__(self, do: Callable[[str], None]) -> None:
        self.do = do
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()  # threads stay behind in a fork
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._doing: set[str] = set()
        self._threads = 0

    def set(self, names: Sequence[str]) -> None:
        """These next, instead of those that wait now; returns at once."""
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            self._waiting = deque(name for name in names if name not in self._doing)
            for _ in range(min(AT_ONCE - self._threads, len(self._waiting))):
                self._threads += 1
                threading.Thread(target=self._work, name="ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                name = self._waiting.popleft()
                self._doing.add(name)
            try:
                self.do(name)
            finally:
                with self._lock:
                    self._doing.discard(name)
