"""The benchmarks run and say what they claim, and the committed records can be read."""

import json
import os
import subprocess
import sys

import pytest
import torch

from autodeco_fast.kernels import token_stats
from bench import clock, memory, report, roofline
from bench.machine import RESULTS, ROOT, device


def test_variants_take_turns_and_compiled_ones_come_last():
    seen = []
    variants = {n: lambda n=n: seen.append(n) for n in ("x, torch.compile", "a", "b")}
    times = clock.interleave(variants, rounds=3, warmup=1, burst=2)
    assert seen == ["a", "a", "b", "b"] * 4 + ["x, torch.compile"] * 8
    assert set(times) == set(variants)
    assert all(t["p20"] <= t["seconds"] <= t["p80"] for t in times.values())


@pytest.mark.skipif(
    device() != "cpu" or not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the resident set of a Linux process",
)
def test_peak_memory_is_what_was_taken():
    assert 60e6 < memory.peak_bytes(lambda: torch.ones(16_000_000)) < 90e6
    assert memory.peak_bytes(lambda: None) < 2e7


def pytest_bench(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "bench", "--bench-shapes=tiny", *options]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--color=no"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_microbenchmark_runs(tmp_path):
    """Grouped, with what a record needs; and a later run is compared with an earlier one."""
    path = tmp_path / "kernels.json"
    printed = pytest_bench("--benchmark-only", f"--benchmark-json={path}")
    assert "benchmark 'sample, peaked" in printed
    record = json.loads(path.read_text())
    assert {"device", "threads", "torch"} <= set(record["machine_info"])
    assert {"id", "dirty"} <= set(record["commit_info"])
    groups: dict[str, dict] = {}
    for one in record["benchmarks"]:
        groups.setdefault(one["group"], {})[one["name"]] = one
        assert one["stats"]["p20"] <= one["stats"]["median"] <= one["stats"]["p80"]
        assert "data" not in one["stats"]
        assert {"over_ours", "peak_mb", "dtype", "share_of_limit"} <= set(one["extra_info"])
        assert {"bytes", "flops"} & set(one["extra_info"])
    first = {next(iter(variants)) for variants in groups.values()}
    assert first == {"sample", "linear_sample", "logit_stats", "temperature_head", "min_p_hinge"}
    assert all(len(variants) >= 2 for variants in groups.values())
    assert "sample" in report.tables({"kernels": record})
    compared = pytest_bench("--benchmark-only", f"--benchmark-compare={path}", "-k", "hinge")
    assert "min_p_hinge (NOW)" in compared


@pytest.mark.slow
def test_disabled_benchmarks_run_once():
    printed = pytest_bench("--benchmark-disable", "-k", "hinge")
    assert "1 passed" in printed
    assert "Median" not in printed


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: p.stem)
def test_records_say_on_what_they_were_taken(path):
    record = json.loads(path.read_text())
    assert {"device", "threads", "torch"} <= set(record["machine_info"])
    assert record["datetime"]
    assert record["benchmarks"]
    assert record["commit_info"]["id"]
    assert not record["commit_info"]["dirty"]
    assert path.stem in report.tables({path.stem: record})


def test_the_plot_needs_nothing_but_records(tmp_path):
    records = {"sampling": json.loads((RESULTS / "cpu/sampling.json").read_text())}
    rows = report.sampling_rows(records)
    report.draw_sampling(tmp_path / "sampling.png", rows, records["sampling"]["machine_info"])
    assert (tmp_path / "sampling.png").stat().st_size > 10_000


def test_the_fast_path_skips_what_is_rare():
    text = """
        /*0000*/ MOV ;
    .L_x_1:
        /*0010*/ LDG ;
        /*0020*/ @P6 BRA `(.L_x_2) ;
        /*0030*/ FSEL ;
        /*0040*/ FSEL ;
    .L_x_2:
        /*0050*/ FMNMX ;
        /*0060*/ @P0 BRA `(.L_x_1) ;
        /*0070*/ EXIT ;
    """
    assert roofline.fast_path(text) == 4


def test_predictions_are_bounded_by_memory():
    row = roofline.sample_row(512, 151_936, instructions=60)
    assert row["predicted_us"] > row["memory_us"] > row["MB"] / 4.8
    linear = roofline.linear_row(1, 4096, 151_936, instructions=1000)
    assert linear["predicted_us"] < linear["product_and_sample_us"]


def test_larger_tiles_are_predicted_to_help():
    product = 2.0 * 8192 * 4096 * 128_256 / roofline.CARD["tflops"]
    pointers, hopper = (
        roofline.streaming_seconds(variant, 8192, 4096, 128_256, instructions=2000)
        for variant in (token_stats.POINTERS, token_stats.HOPPER)
    )
    assert product < hopper < pointers
