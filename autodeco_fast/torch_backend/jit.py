"""Loops that torch has no call for, compiled for the CPU by numba; and rows dealt out to threads.

Modules of such loops do not call one another: numba's cache notices changes in a function's own
file only. What a loop with `fastmath` calls is inlined, or code that was just compiled and code
from the cache would round differently.
"""

import os
from collections.abc import Callable
from functools import cache, partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numba
import torch


def _cached(decorator: Callable, **options) -> Callable[[Callable], Any]:
    """A decorator of numba's that keeps machine code on disk where there is a place to."""

    def decorate(function: Callable) -> Any:
        try:
            return decorator(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written to
            return decorator(**options)(function)

    return decorate


compiled = partial(_cached, numba.njit, nogil=True, error_model="numpy")
elementwise = partial(_cached, numba.vectorize)


def _serve(jobs: SimpleQueue) -> None:
    while True:
        jobs.get()()


@cache
def _jobs(threads: int) -> SimpleQueue:
    """What is put here, one of so many threads calls."""
    jobs = SimpleQueue()
    for _ in range(threads):
        Thread(target=_serve, args=(jobs,), name="autodeco_fast", daemon=True).start()
    return jobs


if hasattr(os, "register_at_fork"):
    # A forked process has the queue, but not its threads.
    os.register_at_fork(after_in_child=_jobs.cache_clear)


def in_threads(work: Callable[[slice], None], rows: int, parts: int) -> None:
    """Calls `work` on slices that cover `rows`, in at most `parts` threads and as many as torch
    has; this one is one of them.

    Slices are taken in turn, so that a thread whose core is busy takes fewer, and one that has not
    begun is not waited for. `work` must let go of the interpreter for most of its time, as compiled
    loops and numpy's do.
    """
    threads = 1 if parts <= 1 else min(parts, rows, torch.get_num_threads())
    if threads <= 1:
        return work(slice(0, rows))
    pieces = min(rows, 4 * threads)
    left = iter([slice(i * rows // pieces, (i + 1) * rows // pieces) for i in range(pieces)])
    ended = SimpleQueue()

    def take() -> None:
        for piece in left:
            error = None
            try:
                work(piece)
            except BaseException as raised:  # of whichever thread, it is the caller's
                error = raised
            ended.put(error)

    jobs = _jobs(torch.get_num_threads())
    for _ in range(threads - 1):
        jobs.put(take)
    take()
    for error in [ended.get() for _ in range(pieces)]:
        if error is not None:
            raise error
