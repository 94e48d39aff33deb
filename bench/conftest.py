"""`pytest bench --benchmark-only`: variants that take turns, in the plugin's table and JSON."""

from collections.abc import Callable

import pytest
import torch

from bench.clock import empty_pair, quantile, turns
from bench.machine import device, machine
from bench.memory import peak_bytes


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--bench-shapes",
        choices=("full", "tiny"),
        default="full",
        help="tiny: one small case of every benchmark, to see that it runs",
    )


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("--bench-shapes") == "full":
        return
    first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
    items[:] = [item for item in items if item in first.values()]


def pytest_benchmark_generate_machine_info(config) -> dict:
    return machine() | ({"empty_pair_seconds": empty_pair()} if device() == "cuda" else {})


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """The 20th and 80th percentile in place of the raw times."""
    for one in output_json["benchmarks"]:
        data = one["stats"].pop("data", None)
        if data:
            one["stats"] |= {"p20": quantile(data, 0.2), "p80": quantile(data, 0.8)}


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--bench-shapes") == "tiny"


def launches(call: Callable[[], object]) -> int:
    """What a call starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@pytest.fixture
def take_turns(request, benchmark, tiny) -> Callable[..., None]:
    """Times variants in turn, `bench/clock.py`; each becomes a benchmark of its own in one group.

    The first variant is ours. Names of the result: `over_ours`, and `share_of_limit` where
    `limit_seconds` is given, or the name of the variant that is the limit.
    """
    session = request.config._benchmarksession
    benchmark._mode = "take_turns"  # or the plugin warns that it was not used

    def run(
        variants: dict[str, Callable[[], object]],
        *,
        group: str,
        rounds: int = 20,
        burst: int = 1,
        limit_seconds: float | str | None = None,
        **facts: object,
    ) -> None:
        if session.disabled:
            for call in variants.values():
                call()
            return
        times = turns(variants, rounds=2 if tiny else rounds, warmup=1 if tiny else 2, burst=burst)
        medians = {name: quantile(values, 0.5) for name, values in times.items()}
        ours = next(iter(medians.values()))
        limit = medians[limit_seconds] if isinstance(limit_seconds, str) else limit_seconds
        for name, call in variants.items():
            one = type(benchmark)(
                request.node,
                add_stats=session.benchmarks.append,
                logger=session.logger,
                warner=request.node.warn,
                disabled=False,
                **session.options,
            )
            one.name, one.group = name, group
            one.fullname = f"{request.node.nodeid}::{group}::{name}"
            one.extra_info = {**facts, "over_ours": medians[name] / ours}
            if limit is not None:
                one.extra_info["share_of_limit"] = limit / medians[name]
            one.extra_info["peak_mb"] = peak_bytes(call) / 1e6
            if device() == "cuda":
                one.extra_info["launches"] = launches(call)
            stats = one._make_stats(iterations=1)
            for value in times[name]:
                stats.update(value)

    return run
