"""Microbenchmarks with pytest-benchmark: variants that take turns, in the plugin's table and JSON.

    pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds
    pytest bench/test_sample.py -k "peaked and warm" --benchmark-only --benchmark-json=FILE
    pytest bench/test_sample.py --benchmark-only --benchmark-compare=FILE
    pytest bench --benchmark-disable --bench-shapes=tiny

`python -m bench.run` takes records. The plugin's options mean what they mean to it;
`--benchmark-min-rounds` asks for more than the 20 rounds, and the second, that every benchmark
takes; time limits and calibration do not apply to turns.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.clock import (
    Call,
    batches,
    device_bound,
    empty_pair,
    host_seconds,
    in_turn,
    quantile,
    spread,
)
from bench.machine import commit_info, device, machine
from bench.memory import peak_mb
from bench.peers import compiled_by_torch
from bench.records import reason

WARMUP = 2  # rounds
SETTLE, SPAN = 0.2, 1.0  # seconds


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--bench-shapes",
        choices=("full", "tiny"),
        default="full",
        help="tiny: one small case of every benchmark, to see that it runs",
    )


def pytest_configure(config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install pytest-benchmark")


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("--bench-shapes") == "full":
        return
    here = Path(__file__).parent
    first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
    items[:] = [one for one in items if here not in one.path.parents or one in first.values()]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config) -> dict:
    return machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config) -> dict:
    return commit_info()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """The 20th and 80th percentile in place of the raw times, unless these are asked for."""
    measured = [one for one in benchmarks if not one.has_error]
    for one, written in zip(measured, output_json["benchmarks"], strict=True):
        written["stats"] |= spread(one.stats.data)
        if not config.getoption("benchmark_save_data"):
            written["stats"].pop("data", None)


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--bench-shapes") == "tiny"


@pytest.fixture
def compiled(tiny) -> Callable[[Callable], Callable]:
    """`torch.compile` for the shapes of this test alone; tiny ones are traced and not compiled."""
    return functools.partial(compiled_by_torch, tiny=tiny)


def launches(call: Call) -> int | None:
    """What a call starts on the GPU; None where the profiler does not work."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError):
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def run_once(variants: dict[str, Call], ours: str) -> dict[str, str]:
    """Calls every variant; returns the peers that cannot run here, with the reason. What ours
    raises is raised."""
    failed = {}
    for name, call in variants.items():
        try:
            call()
        except Exception as error:
            if name == ours:
                raise
            failed[name] = reason(error)
            warnings.warn(f"{name} is left out: {failed[name]}", stacklevel=2)
    if failed and device() == "cuda":
        torch.cuda.empty_cache()
    return failed


def _measured(call: Call) -> dict:
    """What is known of a variant besides its times."""
    facts = {"peak_mb": peak_mb(call)}
    if device() == "cuda":
        facts["launches"] = launches(call)
        facts |= {"host_us": 1e6 * host_seconds(call), "empty_pair_us": 1e6 * empty_pair()}
        facts["device_bound"] = device_bound(call)
    return facts


def ratios(
    times: dict[str, list[float]], ours: str, limit: float | str | None
) -> dict[str, dict[str, float]]:
    """Of variants that took turns: their median over that of ours, the limit over their median."""
    medians = {name: quantile(values, 0.5) for name, values in times.items()}
    found = {name: {"over_ours": median / medians[ours]} for name, median in medians.items()}
    at_most = medians.get(limit) if isinstance(limit, str) else limit
    for name, median in medians.items():
        if at_most is not None:
            found[name]["share_of_limit"] = at_most / median
    return found


def beside(
    first: dict[str, Call], ours: str, limit: float | str | None
) -> tuple[dict[str, Call], Call | None]:
    """Of the first batch, what takes turns with a later one, too, and what is called ahead of each
    turn there, untimed.

    Ours and the limit take turns again, so that ratios are of calls side by side. Ahead of each
    comes the last other variant: threads of compiled code are idle then, and the caches are as that
    variant leaves them, which is how ours finds them in the first batch.
    """
    again = {name: call for name, call in first.items() if name in (ours, limit)}
    others = [call for name, call in first.items() if name not in again]
    return again, others[-1] if others else None


@pytest.fixture
def take_turns(request, benchmark, tiny) -> Callable[..., None]:
    """Times variants in turn, `bench/clock.py`; each becomes a benchmark of its own in one group.

    The first variant is ours. Names of the result: `over_ours`, and `share_of_limit` where
    `limit` is given: seconds, or the name of the variant that is the limit. In a batch behind the
    first (`clock.batches`) both are by ours and the limit as they were timed again there, and
    `ours_beside` is the median of ours. `of` has facts of single variants.
    """
    session = request.config._benchmarksession
    benchmark._mode = "take_turns"  # or the plugin warns that it was not used

    def add(name: str, times: list[float], *, group: str, extra_info: dict) -> None:
        one = type(benchmark)(
            request.node,
            add_stats=session.benchmarks.append,
            logger=session.logger,
            warner=request.node.warn,
            disabled=False,
            **session.options,
        )
        one.name, one.group, one.extra_info = name, group, extra_info
        one.fullname = f"{request.node.nodeid}::{name}"
        one.params = {**(benchmark.params or {}), "variant": name}
        one.param = "-".join(filter(None, (benchmark.param, name)))
        stats = one._make_stats(iterations=1)
        for value in times:
            stats.update(value)

    def run(
        variants: dict[str, Call],
        *,
        group: str,
        rounds: int = 20,
        burst: int = 1,
        limit: float | str | None = None,
        of: dict[str, dict] | None = None,
        **facts: object,
    ) -> None:
        ours, failed, times = next(iter(variants)), {}, {}
        first: dict[str, Call] = {}
        found: dict[str, dict] = {}
        rounds = 2 if tiny else max(rounds, benchmark._min_rounds)
        how = {"rounds": rounds, "burst": burst, "warmup": 1 if tiny else WARMUP}
        how |= {} if tiny else {"settle": SETTLE, "span": SPAN}
        for batch in batches(variants):
            failed |= run_once(batch, ours)
            able = {name: call for name, call in batch.items() if name not in failed}
            if session.disabled or not able:
                continue
            again, foreign = beside(first, ours, limit) if first else ({}, None)
            before = (lambda _, call=foreign: call()) if foreign and burst == 1 else None
            taken = in_turn(again | able, before=before, **how)
            compared = ratios(taken, ours, limit)
            for name in able:
                times[name], found[name] = taken[name], compared[name]
                if first:
                    found[name]["ours_beside"] = quantile(taken[ours], 0.5)
            first = first or able
        for name, taken in times.items():
            extra_info = {**facts, **(of or {}).get(name, {}), **found[name]}
            extra_info |= _measured(variants[name])
            if name == ours and failed:
                extra_info["failed"] = failed
            add(name, taken, group=group, extra_info=extra_info)

    return run
