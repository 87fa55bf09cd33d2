"""A function run over many jobs in other processes: answers in order, a bounded number of jobs in flight.

Imports nothing heavy, for every worker imports it.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from hdl.errors import HdlError

JOBS_AHEAD = 4  # a worker; bounds the answers that wait in memory

Task = TypeVar("Task")
Job = TypeVar("Job")
Answer = TypeVar("Answer")


def in_order(
    function: Callable[[Job], Answer], tasks: Iterator[tuple[Task, Job]], workers: int
) -> Iterator[tuple[Task, Answer]]:
    """Each task with function(its job). workers: number of processes; 0 runs the jobs in this one."""
    if not workers:
        for task, job in tasks:
            yield task, function(job)
        return
    # spawn: this process may have threads (torch, tokenizers), whose locks a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=live_and_die_with_parent)
    waiting: deque[tuple[Task, Future[Answer]]] = deque()
    try:
        for task, job in tasks:
            waiting.append((task, pool.submit(function, job)))
            if len(waiting) > workers * JOBS_AHEAD:
                first, answer = waiting.popleft()
                yield first, answer.result()
        while waiting:
            first, answer = waiting.popleft()
            yield first, answer.result()
    except BrokenProcessPool:
        raise HdlError(
            "a worker process was killed, most likely for want of memory; run again with a smaller --workers "
            "(finished shards are kept and reused)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def live_and_die_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
