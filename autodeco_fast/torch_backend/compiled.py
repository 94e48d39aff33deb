"""Loops that torch has no call for, compiled for the CPU by numba; and rows dealt out to threads.

Modules of such loops do not call one another: numba's cache notices changes in a function's own file only.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
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


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="autodeco_fast")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool, but not its threads


def in_threads(work: Callable[[slice], None], rows: int, parts: int) -> None:
    """Calls `work` on slices that cover `rows`: as many as torch has threads, at most `parts`; one of them in this thread.

    `work` must let go of the interpreter for most of its time, as compiled loops and numpy's do.
    """
    parts = max(1, min(parts, rows, torch.get_num_threads()))
    slices = [slice(i * rows // parts, (i + 1) * rows // parts) for i in range(parts)]
    others = [_pool(torch.get_num_threads()).submit(work, own) for own in slices[1:]]
    work(slices[0])
    for other in others:
        other.result()
