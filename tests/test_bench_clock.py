"""The clock of the benchmarks: turns, ratios of calls side by side, and on a simulated device the
times of calls whose host is slow."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench import clock, limits, peers, records
from bench.conftest import beside, ratios
from bench.machine import device
from tests.reference.peers import eager_nucleus_width, eager_stats


class SimulatedDevice:
    """Two clocks: the host's, and when the device will have done all that was queued."""

    cycles_per_second = 2e9

    def __init__(self, monkeypatch):
        self.host = self.done = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.done = max(device.host, device.done)
                self.at = device.done

            def query(self):
                return self.at <= device.host

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(clock, "device", lambda: "cuda")
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(clock, "_larger_than_the_cache", lambda: torch.zeros(1))
        monkeypatch.setattr(clock, "_cycles_per_second", clock._cycles_per_second.__wrapped__)

    def queue(self, seconds):
        self.done = max(self.host, self.done) + seconds

    def sleep(self, cycles):
        self.queue(cycles / self.cycles_per_second)

    def wait(self):
        self.host = max(self.host, self.done)

    def call(self, *, host, device, waits=False):
        def run():
            if waits:
                self.wait()
            self.host += host
            self.queue(device)

        return run


@pytest.mark.parametrize("host", [1e-5, 9e-4, 5e-3])
def test_a_slow_host_is_not_in_a_time_of_the_device(monkeypatch, host):
    simulated = SimulatedDevice(monkeypatch)
    work = simulated.call(host=host, device=2e-5)
    times = clock.turns({"work": work}, rounds=3, warmup=1)["work"]
    assert times == pytest.approx([2e-5] * 3)
    assert clock.host_seconds(work) == pytest.approx(host)
    assert clock.device_bound(work)
    assert clock.sleep_before(work) == pytest.approx(max(6e-4, 3 * host))


def test_with_a_sleep_that_is_too_short_they_are_and_it_is_said(monkeypatch):
    simulated = SimulatedDevice(monkeypatch)
    work = simulated.call(host=9e-4, device=2e-5)
    taken, ahead = clock._reading(work, 6e-4)
    assert (taken, ahead) == (pytest.approx(3.2e-4), False)


def test_a_call_that_waits_for_the_device_is_not_bound_by_it(monkeypatch):
    simulated = SimulatedDevice(monkeypatch)
    work = simulated.call(host=1e-3, device=1e-3, waits=True)
    assert not clock.device_bound(work)
    slow = simulated.call(host=3.0, device=1e-3, waits=True)
    assert clock.sleep_before(slow) == 0  # which would be taken from its time
    assert clock.turns({"slow": slow}, rounds=1)["slow"] == [pytest.approx(3.001)]
    taken = clock.in_turn({"work": work}, rounds=1, warmup=0, wall=True)["work"]
    assert taken == [pytest.approx(2e-3)]


def test_on_a_gpu_compiled_code_takes_turns_with_the_rest(monkeypatch):
    monkeypatch.setattr(clock, "device", lambda: "cuda")
    variants = {"a": dict, "x, torch.compile": dict}
    assert clock.batches(variants) == [variants]


@pytest.mark.skipif(device() != "cpu", reason="wall-clock time")
def test_turns_may_alternate_and_have_something_ahead_of_each():
    seen, kept = [], {}
    variants = {name: lambda name=name: seen.append(name) for name in "ab"}
    before = str.upper
    clock.in_turn(
        variants,
        rounds=2,
        warmup=1,
        alternate=True,
        before=lambda name: seen.append(before(name)),
        times=kept,
    )
    assert seen == [*"AaBb", *"BbAa", *"AaBb"]
    assert {name: len(seconds) for name, seconds in kept.items()} == {"a": 2, "b": 2}


@pytest.mark.skipif(device() != "cpu", reason="wall-clock time")
def test_what_was_timed_before_an_interruption_is_there():
    kept, calls = {}, []

    def work():
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clock.in_turn({"a": work}, rounds=9, warmup=1, times=kept)
    assert len(kept["a"]) == 2


def test_rounds_of_the_first_seconds_are_not_kept(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    calls = []
    how = {"rounds": 1, "warmup": 1, "settle": 20.0}
    kept = clock.in_turn({"a": lambda: calls.append(1)}, **how)["a"]
    # A round looks at the clock four times: whether it is kept, and around the call.
    assert (len(kept), len(calls)) == (1, 6)
    longer = clock.in_turn({"a": lambda: None}, **how, span=20.0)["a"]
    assert len(longer) == 5


def test_a_later_batch_is_compared_with_what_was_timed_in_it():
    """With ours and the limit as they were there, not as they were in the first batch."""
    first = {"ours": dict, "limit": dict, "b": dict, "c": list}
    again, foreign = beside(first, "ours", "limit")
    assert (list(again), foreign) == (["ours", "limit"], list)
    assert beside({"ours": dict}, "ours", None) == ({"ours": dict}, None)
    times = {"ours": [2.0, 2.0], "limit": [1.0, 1.0], "x, torch.compile": [3.0, 5.0]}
    assert ratios(times, "ours", "limit")["x, torch.compile"] == {
        "over_ours": 2.0,
        "share_of_limit": 0.25,
    }
    assert ratios(times, "ours", 0.5)["ours"] == {"over_ours": 1.0, "share_of_limit": 0.25}
    assert "share_of_limit" not in ratios(times, "ours", None)["ours"]


@pytest.mark.parametrize("peer", ["stats", "width"])
def test_the_cast_to_fp32_is_in_what_is_compiled(peer):
    """Or compiled code would read what an eager cast wrote, twice as many bytes."""
    z, seen = torch.randn(3, 50).bfloat16(), []

    def look(graph, inputs):
        seen.extend(x.dtype for x in inputs if x.ndim == 2)
        return graph.forward

    compiled = {
        "stats": lambda: torch.compile(eager_stats, backend=look)(z, torch.tensor([0, 7, 49])),
        "width": lambda: torch.compile(eager_nucleus_width, backend=look)(torch.rand(3), z),
    }
    torch._dynamo.reset()
    compiled[peer]()
    assert seen == [torch.bfloat16]


def test_compiled_peers_are_compiled_for_every_shape():
    """Many shapes of one function are more than `torch.compile` takes by itself: then it runs it as
    it is, in silence."""

    def is_compiled(x):
        return x + torch.compiler.is_compiling()

    for n in range(2, 6 + torch._dynamo.config.recompile_limit):
        compiled = peers.compiled_by_torch(is_compiled, tiny=True)
        assert torch.equal(compiled(torch.zeros(n)), torch.ones(n))


def test_limits_are_recorded_with_their_rounds(tmp_path):
    limits.main(["--tiny", "--output", str(tmp_path / "limits.json")])
    record = json.loads((tmp_path / "limits.json").read_text())
    assert {one["stats"]["rounds"] for one in record["benchmarks"][:2]} == {20}
    for one in record["benchmarks"][:2]:
        rate = one["extra_info"]["bytes"] / one["stats"]["median"]
        assert one["extra_info"]["GB/s"] == pytest.approx(rate / 1e9)


def test_the_bytes_of_an_8_bit_copy_are_its_own():
    """And those of the rows that it cannot rule out; not of a 16-bit weight."""
    from autodeco_fast import QuantizedLMHead
    from bench.test_linear_sample import bytes_of_copy

    hidden, weight = torch.randn(2, 64), torch.randn(500, 64)
    head = QuantizedLMHead(weight)
    left = head.possible(hidden, 0.7, 0.1).any(0).sum().item()
    assert 0 < left < 500
    assert bytes_of_copy(head, hidden) == 500 * (64 + 12) + left * 64 * 4


def test_a_reason_is_one_line():
    assert records.reason(RuntimeError("no such card\nand more")) == "RuntimeError: no such card"
    assert records.reason(ValueError()) == "ValueError: "
