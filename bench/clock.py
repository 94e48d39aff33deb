"""Seconds of a call, and of several that take turns.

On a CPU the clock is wall-clock time. On a GPU it is a pair of device events: before it a buffer
larger than the second-level cache is read, which leaves that cache without the call's data, and the
device sleeps, three times as long as the host took for the call (`host_seconds`), so that the host
is ahead of it all the time. Where the host was not (it waited for the device, or had to fill a
queue), its delays are in the time: `device_bound` says so. The pair around nothing is
`empty_pair()`. What is long and uses the host as much as the device is timed by `wall_seconds`.
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
_SHORTEST_SLEEP, _LONGEST_SLEEP = 6e-4, 0.05  # seconds
_CYCLES = 1_000_000  # of the sleep that is timed


@functools.cache
def _larger_than_the_cache() -> torch.Tensor:
    return torch.zeros(1 << 26, device="cuda")  # 256 MB


@functools.cache
def _cycles_per_second() -> float:
    """Of the device's sleep: the median of 5."""
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(_CYCLES)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return _CYCLES / statistics.median(times)


def _sleep(duration: float) -> None:
    torch.cuda._sleep(int(duration * _cycles_per_second()))


def sleep_before(work: Call) -> float:
    """Seconds that the device sleeps before a call that is timed: none on a CPU, and none for a
    host that takes so long that it waits for something, and would use the sleep."""
    if device() == "cpu":
        return 0.0
    sleep = max(_SHORTEST_SLEEP, 3 * host_seconds(work))
    return sleep if sleep <= _LONGEST_SLEEP else 0.0


def wall_seconds(work: Call) -> float:
    """Of one call, until the device has done what it asked for."""
    if device() == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _reading(work: Call, sleep: float) -> tuple[float, bool]:
    """Seconds of one call, and whether the device still slept when the host had started all of
    it."""
    if device() == "cpu":
        return wall_seconds(work), True
    _larger_than_the_cache().amax()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sleep:
        _sleep(sleep)
    start.record()
    work()
    end.record()
    ahead = not start.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, ahead


def _nothing() -> None:
    pass


@functools.cache
def empty_pair() -> float:
    """What the clock shows around nothing: the median of 20."""
    return statistics.median(_reading(_nothing, _SHORTEST_SLEEP)[0] for _ in range(20))


def host_seconds(work: Call) -> float:
    """Until a call returns to a host whose device is busy: the median of 5."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        _sleep(_SHORTEST_SLEEP)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_bound(work: Call) -> bool:
    """Whether times of this call are the device's alone: the host was ahead of it in most of 5."""
    sleep = sleep_before(work)
    return sum(_reading(work, sleep)[1] for _ in range(5)) > 2


def _last_of_burst(work: Call, burst: int, sleep: float | None) -> float:
    started = time.perf_counter()
    for _ in range(burst - 1):
        work()
        if time.perf_counter() - started > LONG:
            break
    return wall_seconds(work) if sleep is None else _reading(work, sleep)[0]


def batches(variants: dict[str, Call]) -> list[dict[str, Call]]:
    """Variants that take turns with each other: all on a GPU; on a CPU those of `torch.compile`
    after all others.

    On a CPU compiled code can bring threads of its own, which may still hold a core when the next
    variant begins.
    """
    if device() != "cpu":
        return [variants]
    compiled = {name: work for name, work in variants.items() if name.endswith(COMPILED)}
    others = {name: work for name, work in variants.items() if name not in compiled}
    return [batch for batch in (others, compiled) if batch]


def turns(
    variants: dict[str, Call], *, rounds: int = 20, warmup: int = 2, burst: int = 1
) -> dict[str, list[float]]:
    """Seconds of every variant, `rounds` of them, those of a batch taken in turn."""
    times: dict[str, list[float]] = {}
    for batch in batches(variants):
        times |= in_turn(batch, rounds=rounds, warmup=warmup, burst=burst)
    return times


def in_turn(
    variants: dict[str, Call],
    *,
    rounds: int = 20,
    warmup: int = 2,
    settle: float = 0.0,
    span: float = 0.0,
    burst: int = 1,
    before: Callable[[str], object] | None = None,
    alternate: bool = False,
    wall: bool = False,
    times: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every variant, `rounds` of them or more, taken in turn so that a slow spell of the
    machine hits all.

    A turn is `burst` calls in a row (fewer, but two, once they have taken `LONG`), the last of
    which is timed: with 1, a variant finds the caches as the variant before left them (on a GPU
    empty), with more as its own call before left them.

    Args:
        warmup, settle: rounds ahead of those that are kept, at least so many, and for so many
            seconds: on a CPU a short call gets faster over the first twenty rounds.
        span: seconds that the rounds take at least; more than `rounds` of short calls then. A spell
            in which other guests of a machine use its caches lasts tenths of a second.
        before: called with a variant's name ahead of its turn, and not timed.
        alternate: every second round goes through the variants backwards.
        wall: takes `wall_seconds`.
        times: filled and returned, for a caller that wants what there is after an interruption.
    """
    times = {} if times is None else times
    times |= {name: [] for name in variants}
    sleeps: dict[str, float | None] = dict.fromkeys(variants) if wall else {}
    started, turn, kept = time.perf_counter(), 0, 0
    while kept < rounds or time.perf_counter() - started < settle + span:
        keep = turn >= warmup and time.perf_counter() - started >= settle
        order = list(variants)
        for name in reversed(order) if alternate and turn % 2 else order:
            if before is not None:
                before(name)
            if name not in sleeps:
                sleeps[name] = sleep_before(variants[name])
            taken = _last_of_burst(variants[name], burst, sleeps[name])
            if keep:
                times[name].append(taken)
        turn, kept = turn + 1, kept + keep
    return times


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def spread(values: list[float]) -> dict[str, float]:
    """`p20` and `p80`, which the plugin does not compute."""
    return {"p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}
