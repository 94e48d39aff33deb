"""The benchmarks run and say what they claim, and the committed records can be read."""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import (
    clock,
    machine,
    memory,
    records,
    report,
)
from bench import run as bench_run
from bench.conftest import run_once
from bench.end_to_end import generate, training
from bench.machine import RESULTS, ROOT, device

OURS = {
    *("sample", "linear_sample", "logit_stats", "token_stats"),
    *("temperature_head", "min_p_hinge", "nucleus_width"),
}


@pytest.mark.skipif(device() != "cpu", reason="on a GPU they take turns with the rest")
def test_variants_take_turns_and_compiled_ones_come_last():
    seen = []
    variants = {n: lambda n=n: seen.append(n) for n in ("x, torch.compile", "a", "b")}
    times = clock.turns(variants, rounds=3, warmup=1, burst=2)
    assert seen == ["a", "a", "b", "b"] * 4 + ["x, torch.compile"] * 8
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(variants, 3)


@pytest.mark.skipif(device() != "cpu", reason="bursts are for CPUs")
def test_a_burst_of_long_calls_is_two(monkeypatch):
    monkeypatch.setattr(clock, "LONG", -1.0)
    seen = []
    clock.turns({"a": lambda: seen.append("a")}, rounds=1, warmup=0, burst=6)
    assert seen == ["a", "a"]


@pytest.mark.skipif(
    device() != "cpu" or not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the resident set of a Linux process",
)
def test_peak_memory_is_what_was_taken():
    assert 60e6 < memory.peak_bytes(lambda: torch.ones(16_000_000)) < 90e6
    assert memory.peak_bytes(lambda: None) < 2e7


def test_a_peer_that_cannot_run_is_noted():
    def broken():
        raise RuntimeError("no such card\nand a traceback")

    with pytest.warns(UserWarning, match="theirs is left out"):
        failed = run_once({"ours": dict, "theirs": broken}, "ours")
    assert failed == {"theirs": "RuntimeError: no such card"}
    with pytest.raises(RuntimeError, match="no such card"):
        run_once({"ours": broken}, "ours")


def pytest_bench(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", *options, "--bench-shapes=tiny"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--color=no"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def taken(tmp_path_factory) -> tuple[str, dict]:
    """What the microbenchmarks print, and their record."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path_factory.mktemp("bench") / "all.json"
    printed = pytest_bench("bench", "--benchmark-only", f"--benchmark-json={path}")
    return printed, json.loads(path.read_text()) | {"path": str(path)}


@pytest.mark.slow
def test_every_microbenchmark_runs(taken):
    """Grouped by shape, beside its peers, with what a record needs."""
    printed, record = taken
    assert "benchmark 'sample, peaked, B=1, V=999, warm': 5 tests" in printed or device() == "cuda"
    assert {"device", "threads", "torch"} <= set(record["machine_info"])
    assert {"id", "time", "dirty"} == set(record["commit_info"])
    groups: dict[str, dict] = {}
    for one in record["benchmarks"]:
        groups.setdefault(one["group"], {})[one["name"]] = one
        assert one["stats"]["p20"] <= one["stats"]["median"] <= one["stats"]["p80"]
        assert "data" not in one["stats"]
        assert {"over_ours", "peak_mb", "dtype", "share_of_limit"} <= set(one["extra_info"])
        assert {"bytes", "flops"} & set(one["extra_info"])
        assert one["params"]["variant"] == one["name"]
    assert all(len(variants) >= 2 for variants in groups.values())
    ours = {next(iter(variants)): variants for variants in groups.values()}
    assert set(ours) == OURS
    for name, variants in ours.items():
        assert variants[name]["extra_info"]["over_ours"] == 1
        if device() == "cpu":
            assert "failed" not in variants[name]["extra_info"]
            beside = {n for n, one in variants.items() if "ours_beside" in one["extra_info"]}
            assert beside == {n for n in variants if n.endswith(clock.COMPILED)}
            assert beside or name == "linear_sample"  # which has no compiled peer
    assert "min_p_hinge" in report.tables({"all": record})


@pytest.mark.slow
def test_a_later_run_is_compared_with_an_earlier_one(taken):
    """Variant by variant; and grouped as asked."""
    _, record = taken
    options = ("--benchmark-only", f"--benchmark-compare={record['path']}")
    printed = pytest_bench("bench/test_hinge.py", *options, "--benchmark-group-by=param:variant")
    for name in ("min_p_hinge", "eager torch", "torch.compile"):
        (block,) = [b for b in printed.split(" benchmark ") if b.startswith(f"'variant={name}'")]
        assert f"{name} (NOW)" in block
        assert block.count(name) == 3  # the title, then, and now


@pytest.mark.slow
def test_disabled_benchmarks_run_once():
    """Beside tests of the same file name."""
    pytest.importorskip("pytest_benchmark")
    printed = pytest_bench(
        *("bench/test_temperature_head.py", "tests/test_temperature_head.py"),
        *("--benchmark-disable", "-k", "test_temperature_head_forward"),
    )
    assert "1 passed" in printed
    assert "Median" not in printed


def test_without_the_plugin_one_line_says_so():
    command = [sys.executable, "-m", "pytest", "bench/test_hinge.py", "-p", "no:benchmark"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 4
    assert done.stderr.strip() == (
        "ERROR: bench/ needs pytest-benchmark: pip install pytest-benchmark"
    )


@pytest.mark.parametrize("name", sorted(bench_run.SCRIPTS))
def test_every_script_runs(name, tmp_path):
    path = tmp_path / "draft"
    importlib.import_module(bench_run.SCRIPTS[name]).main(["--tiny", "--output", str(path)])
    record = json.loads(path.read_text())
    assert {"id", "time", "dirty"} == set(record["commit_info"])
    assert all(one["stats"]["median"] > 0 for one in record["benchmarks"])
    assert len({one["fullname"] for one in record["benchmarks"]}) == len(record["benchmarks"])
    assert all(name in one["group"] for one in record["benchmarks"])
    assert name in report.tables({name: record})


def test_a_record_is_written_as_it_grows(tmp_path, monkeypatch):
    """What ends a script early leaves the shapes that it had finished."""
    taken = iter([[{"variant": "first", "seconds": 1.0}], KeyboardInterrupt()])

    def measure(*_, **__):
        one = next(taken)
        if isinstance(one, KeyboardInterrupt):
            raise one
        return one

    monkeypatch.setattr(training, "measure", measure)
    path = tmp_path / "draft"
    with pytest.raises(KeyboardInterrupt):
        training.main(["--shapes", "1,2,3", "4,5,6", "7,8,9", "--output", str(path)])
    assert [one["name"] for one in json.loads(path.read_text())["benchmarks"]] == ["first"]


def test_turns_that_are_interrupted_are_recorded(tmp_path, monkeypatch):
    def in_turn(variants, *, times, **_):
        times |= {name: [2.0, 1.0] for name in variants}
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "in_turn", in_turn)
    path = tmp_path / "draft"
    with pytest.raises(KeyboardInterrupt):
        generate.main(["--tiny", "--output", str(path)])
    assert {one["stats"]["rounds"] for one in json.loads(path.read_text())["benchmarks"]} == {2}


def test_a_training_peer_that_fails_is_noted_and_ours_is_not_excused(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("an index is out of range\nand a traceback")

    monkeypatch.setattr(training.autodeco, "step", broken)
    small = (8, 16, 99, torch.float32)
    results = training.measure(*small, with_released=True, tiny=True)
    notes = {one["variant"]: one["note"] for one in results if "note" in one}
    reason = "RuntimeError: an index is out of range"
    assert notes == {
        f"AutoDeco's released {kind} step": reason for kind in ("temperature", "joint")
    }
    timed = {one["variant"] for one in results if "seconds" in one}
    assert {training.HINGE, training.JOINT, training.EAGER} <= timed
    monkeypatch.setattr(training, "training_step", broken)
    with pytest.raises(RuntimeError, match="out of range"):
        training.measure(*small, with_released=False, tiny=True)


def test_a_run_replaces_a_record_only_by_a_record(tmp_path, monkeypatch):
    (tmp_path / "limits.json").write_text("{}")
    monkeypatch.setitem(bench_run.SCRIPTS, "limits", "bench.no_such_module")
    with (tmp_path / "log").open("w") as log:
        assert not bench_run.take("limits", folder=tmp_path, tiny=True, log=log)
    assert (tmp_path / "limits.json").read_text() == "{}"
    with pytest.raises(SystemExit):
        bench_run.parse_names(argparse.ArgumentParser(), ["hinges"], bench_run.NAMES)


def test_a_step_that_takes_too_long_is_interrupted(tmp_path):
    code = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('kept')"
    with (tmp_path / "log").open("w") as log:
        assert not bench_run.run(["-c", code], log=log, limit=2.0)
    assert (tmp_path / "log").read_text().splitlines() == ["interrupted after 2 s", "kept"]


def committed(folder: Path, *, tracked: str) -> Callable[..., None]:
    """A repository with one commit, of a file `kernel.py`; and git in it."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    git("init")
    (folder / "kernel.py").write_text(tracked)
    git("add", "kernel.py")
    git("commit", "-m", "first")
    return git


def test_a_new_kernel_file_makes_a_tree_differ_from_its_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    git = committed(tmp_path, tracked="x = 1\n")
    assert machine.commit_info()["dirty"] is False
    (tmp_path / "notes.txt").write_text("")
    assert machine.commit_info()["dirty"] is False
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/new.py").write_text("")
    assert machine.commit_info()["dirty"] is True
    git("add", "kernels/new.py")
    git("commit", "-m", "second")
    assert machine.commit_info()["dirty"] is False
    (tmp_path / "kernel.py").write_text("x = 2\n")
    assert machine.commit_info()["dirty"] is True


def make_bench() -> str:
    """What `make bench` runs."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    rest = lines[next(i for i, line in enumerate(lines) if line.startswith("bench:")) + 1 :]
    return "\n".join(itertools.takewhile(str.strip, rest))


def test_make_bench_takes_every_record_of_a_cpu_but_vllms():
    scripts = {"linear_sample_repairs", "quantized_head"}
    names = {path.stem for path in (RESULTS / "cpu").glob("*.json")} - {"serving"}
    assert names <= set(bench_run.NAMES) | scripts
    assert "-m bench.run\n" in make_bench()
    for name in (*scripts, "resources", "roofline", "quantized_head_tiles", "report"):
        assert f"-m bench.{name}" in make_bench()


def test_where_git_cannot_tell_nobody_claims_a_clean_tree(tmp_path, monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit_info() == {"id": "unknown", "time": None, "dirty": None}
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert machine.commit_info() == {"id": "abc", "time": None, "dirty": None}


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: p.stem)
def test_records_say_on_what_they_were_taken(path):
    record = json.loads(path.read_text())
    assert {"device", "threads", "torch"} <= set(record["machine_info"])
    assert record["datetime"]
    assert record["benchmarks"]
    assert record["commit_info"]["id"] != "unknown"
    assert not record["commit_info"]["dirty"]
    assert path.stem in report.tables({path.stem: record})


def test_the_plot_needs_nothing_but_records(tmp_path):
    found = {p.stem: json.loads(p.read_text()) for p in (RESULTS / "cpu").glob("*.json")}
    record = report.sampling_record(found)
    assert {one["logits"] for one in report.sampling_results(record)} == {"peaked", "flat"}
    report.draw_sampling(tmp_path / "sampling.png", record)
    assert (tmp_path / "sampling.png").stat().st_size > 10_000


def test_the_plot_has_a_line_for_every_sampler(tmp_path):
    """More of them than colours, as on a GPU with every peer."""
    record = json.loads((RESULTS / "cpu/sample.json").read_text())
    benchmarks = [
        one
        for one in record["benchmarks"]
        if one["extra_info"]["V"] == 151_936 and one["name"] != "transformers"
    ]
    names = [f"sampler {i}" for i in range(3 * len(report.OTHERS))]
    benchmarks += [
        {**one, "name": name} for one in benchmarks if one["name"] == "sample" for name in names
    ]
    report.draw_sampling(tmp_path / "sampling.png", record | {"benchmarks": benchmarks})
    assert (tmp_path / "sampling.png").stat().st_size > 10_000
    spare = itertools.islice(report.styles(), len(names))
    assert len(set(spare)) == len(names)


def test_durations_have_three_digits_and_a_unit():
    seconds = (3.456, 0.1234, 48.06e-6, 12.3e-9, 12345.0, 0.0)
    written = ["3.46 s", "123 ms", "48.1 µs", "12.3 ns", "12,345 s", "0 ns"]
    assert [records.duration(s) for s in seconds] == written
