"""The benchmark harness measures what it says, and the committed records can be read."""

import json
import os

import pytest
import torch

from autodeco_fast.kernels import token_stats
from bench import harness, report, roofline


def test_variants_take_turns_and_compiled_ones_come_last():
    seen = []
    names = ("x, torch.compile", "a", "b")
    times = harness.interleave(
        {n: lambda n=n: seen.append(n) for n in names}, samples=3, warmup=1, burst=2
    )
    assert seen == ["a", "a", "b", "b"] * 4 + ["x, torch.compile"] * 8
    assert set(times) == set(names)
    assert all(t["p20"] <= t["seconds"] <= t["p80"] for t in times.values())


@pytest.mark.skipif(
    harness.device() != "cpu" or not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the resident set of a Linux process",
)
def test_peak_memory_is_what_was_taken():
    assert 60e6 < harness.peak_bytes(lambda: torch.ones(16_000_000)) < 90e6
    assert harness.peak_bytes(lambda: None) < 2e7


@pytest.mark.parametrize("path", sorted(harness.RESULTS.rglob("*.json")), ids=lambda p: p.stem)
def test_records_say_on_what_they_were_taken(path):
    record = json.loads(path.read_text())
    assert {"device", "threads", "torch", "commit", "date"} <= set(record["machine"])
    assert not record["machine"]["commit"].endswith("+changes")
    assert record["rows"]
    assert path.stem in report.tables({path.stem: record})


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
