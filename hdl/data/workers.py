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

JOBS_AHEAD = 4  # bundles a worker; bounds the answers that wait in memory

Task = TypeVar("Task")
Job = TypeVar("Job")
Answer = TypeVar("Answer")


def weightless(answer: object) -> float:
    return 0


def in_order(
    function: Callable[[Job], Answer],
    tasks: Iterator[tuple[Task, Job]],
    workers: int,
    weight: Callable[[Job], float] = lambda job: 1,
    answer_weight: Callable[[Answer], float] = weightless,
) -> Iterator[tuple[Task, Answer]]:
    """Each task with function(its job). workers: number of processes; 0 runs the jobs in this one.

    weight: of a job; they are handed over in bundles that weigh at most 1, for handing over a job takes longer
    than doing a small one. answer_weight, a function of a module: of an answer; a worker stops within a bundle
    when its answers weigh 1, to bound the memory they take on their way back.
    """
    if not workers:
        for task, job in tasks:
            yield task, function(job)
        return
    # spawn: this process may have threads (torch, tokenizers), whose locks a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=live_and_die_with_parent)
    waiting: deque[tuple[list[tuple[Task, Job]], Future[list[Answer]]]] = deque()

    def hand_over(bundle: list[tuple[Task, Job]]) -> Future[list[Answer]]:
        return pool.submit(_answers, function, [job for _, job in bundle], answer_weight)

    def of_first() -> Iterator[tuple[Task, Answer]]:
        bundle, future = waiting.popleft()
        while True:
            answers = future.result()
            yield from zip([task for task, _ in bundle], answers)
            if len(answers) == len(bundle):
                return
            bundle = bundle[len(answers) :]
            future = hand_over(bundle)

    try:
        for bundle in _bundles(tasks, weight):
            waiting.append((bundle, hand_over(bundle)))
            if len(waiting) > workers * JOBS_AHEAD:
                yield from of_first()
        while waiting:
            yield from of_first()
    except BrokenProcessPool:
        raise HdlError(
            "a worker process was killed, most likely for want of memory; run again with a smaller --workers "
            "(finished shards are kept and reused)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _bundles(
    tasks: Iterator[tuple[Task, Job]], weight: Callable[[Job], float]
) -> Iterator[list[tuple[Task, Job]]]:
    bundle: list[tuple[Task, Job]] = []
    total = 0.0
    for task, job in tasks:
        more = weight(job)
        if bundle and total + more > 1:
            yield bundle
            bundle, total = [], 0.0
        bundle.append((task, job))
        total += more
    if bundle:
        yield bundle


def _answers(
    function: Callable[[Job], Answer], jobs: list[Job], weight: Callable[[Answer], float]
) -> list[Answer]:
    """At least one; fewer than jobs where they weigh 1 already."""
    answers: list[Answer] = []
    total = 0.0
    for job in jobs:
        answers.append(function(job))
        total += weight(answers[-1])
        if total >= 1:
            break
    return answers


def live_and_die_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
