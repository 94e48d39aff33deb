"""Seconds of a call, and of several that take turns.

On a CPU the clock is wall-clock time. On a GPU it is a pair of device events: before it a buffer
larger than the second-level cache is read, which leaves that cache without the call's data, and the
device sleeps for a while, so that the host is ahead of it when the first event comes. The pair
around nothing is `empty_pair()`.
"""

import functools
import time
from collections.abc import Callable

import torch

from bench.machine import device

COMPILED = "torch.compile"  # the end of such variants' names
_SLEEP_CYCLES = 200_000  # about 0.1 ms


@functools.cache
def _larger_than_the_cache() -> torch.Tensor:
    return torch.zeros(1 << 26, device="cuda")  # 256 MB


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    if device() == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    _larger_than_the_cache().amax()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def empty_pair() -> float:
    """What the clock shows around nothing: the median of 20."""
    return sorted(seconds(lambda: None) for _ in range(20))[10]


def turns(
    variants: dict[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 2, burst: int = 1
) -> dict[str, list[float]]:
    """Seconds of every variant, `rounds` of them, taken in turn so that a slow spell of the machine
    hits all.

    A turn is `burst` calls in a row, the last of which is timed: with 1, a variant finds the caches
    as the variant before left them (on a GPU empty), with more as its own call before left them.
    Variants whose name ends in "torch.compile" take their turns after all others: on a CPU such
    code can bring threads of its own, which may still hold a core when the next variant begins.
    """
    compiled = {name: work for name, work in variants.items() if name.endswith(COMPILED)}
    others = {name: work for name, work in variants.items() if name not in compiled}
    if compiled and others:
        options = {"rounds": rounds, "warmup": warmup, "burst": burst}
        return turns(others, **options) | turns(compiled, **options)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, work in variants.items():
            for _ in range(burst):
                taken = seconds(work)
            if turn >= warmup:
                times[name].append(taken)
    return times


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def interleave(
    variants: dict[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 2, burst: int = 1
) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of `turns`."""
    times = turns(variants, rounds=rounds, warmup=warmup, burst=burst)
    return {
        name: {
            "seconds": quantile(values, 0.5),
            "p20": quantile(values, 0.2),
            "p80": quantile(values, 0.8),
        }
        for name, values in times.items()
    }
