"""Seconds of a call, and of several that take turns.

On a CPU the clock is wall-clock time. On a GPU it is a pair of device events: before it a buffer
larger than the second-level cache is read, which leaves that cache without the call's data, and the
device sleeps for a while, so that the host is ahead of it when the first event comes. The pair
around nothing is `empty_pair()`; what the host takes to start a call is `host_seconds()`, and a
call for which that is longer than the sleep is timed with the host's delays in it.
"""

import functools
import statistics
import time
from collections.abc import Callable

import torch

from bench.machine import device

Call = Callable[[], object]
COMPILED = "torch.compile"  # the end of such variants' names
LONG = 0.05  # seconds after which a burst stops
_SLEEP_CYCLES = 1_000_000  # about 0.6 ms


@functools.cache
def _larger_than_the_cache() -> torch.Tensor:
    return torch.zeros(1 << 26, device="cuda")  # 256 MB


def seconds(work: Call) -> float:
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


def _nothing() -> None:
    pass


@functools.cache
def empty_pair() -> float:
    """What the clock shows around nothing: the median of 20."""
    return statistics.median(seconds(_nothing) for _ in range(20))


def host_seconds(work: Call) -> float:
    """Until a call returns to a host whose device is busy: the median of 5."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(_SLEEP_CYCLES)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(times)


def _last_of_burst(work: Call, burst: int) -> float:
    started = time.perf_counter()
    for _ in range(burst - 1):
        work()
        if time.perf_counter() - started > LONG:
            break
    return seconds(work)


def batches(variants: dict[str, Call]) -> list[dict[str, Call]]:
    """Variants that take turns with each other: those of `torch.compile` after all others.

    On a CPU compiled code can bring threads of its own, which may still hold a core when the next
    variant begins.
    """
    compiled = {name: work for name, work in variants.items() if name.endswith(COMPILED)}
    others = {name: work for name, work in variants.items() if name not in compiled}
    return [batch for batch in (others, compiled) if batch]


def turns(
    variants: dict[str, Call], *, rounds: int = 20, warmup: int = 2, burst: int = 1
) -> dict[str, list[float]]:
    """Seconds of every variant, `rounds` of them, taken in turn so that a slow spell of the machine
    hits all.

    A turn is `burst` calls in a row (fewer, but two, once they have taken `LONG`), the last of
    which is timed: with 1, a variant finds the caches as the variant before left them (on a GPU
    empty), with more as its own call before left them.
    """
    times: dict[str, list[float]] = {}
    for batch in batches(variants):
        times |= {name: [] for name in batch}
        for turn in range(warmup + rounds):
            for name, work in batch.items():
                taken = _last_of_burst(work, burst)
                if turn >= warmup:
                    times[name].append(taken)
    return times


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def spread(values: list[float]) -> dict[str, float]:
    """`p20` and `p80`, which the plugin does not compute."""
    return {"p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}
