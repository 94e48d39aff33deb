"""What the benchmarks predict without a GPU: compiled kernels, counts, models of a card."""

import argparse
from pathlib import Path

import pytest
import torch

from autodeco_fast.kernels import sample, token_stats
from bench import linear_sample_tiles, quantized_head_tiles, records, resources, roofline
from bench.linear_sample_tiles import Tile


def test_kernels_are_found_by_name_and_constants():
    """Not by their place in a list; what is there twice, or not at all, is no answer."""
    early = resources.find_entry(sample._draw, dependent=True)
    assert early[0] is sample._draw
    assert early[2]["dependent"] is True
    inverse = resources.find_entry(token_stats._tiles, x_ptr="*bf16", inverse_ptr=None)
    assert inverse[2]["inverse_ptr"] is None
    with pytest.raises(LookupError, match="3 entries of _draw for sm_90"):
        resources.find_entry(sample._draw)
    with pytest.raises(LookupError, match="0 entries of _draw for gfx942"):
        resources.find_entry(sample._draw, "gfx942", dependent=True)


def test_counts_are_of_the_model_that_is_installed(monkeypatch):
    """Or else taking `predictions.json` again would lose its share."""
    parser = argparse.ArgumentParser()
    records.add_model_option(parser)
    monkeypatch.setattr(records.smollm2, "folder", lambda: Path("converted"))
    for here, expected in ((True, "converted"), (False, None)):
        monkeypatch.setattr(records.smollm2, "available", lambda here=here: here)
        assert records.model_of(parser.parse_args([])) == expected
        assert records.model_of(parser.parse_args(["--model", "mine"])) == "mine"


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


COUNTS = {"tile": 60, "noise": 500, "group": 50, "program": 700}


def test_predictions_are_bounded_by_memory():
    one = roofline.predict_sample(512, 151_936, COUNTS, 0.01)
    assert one["predicted_us"] > one["memory_us"] > one["MB"] / 4.8
    noisy = roofline.predict_sample(512, 151_936, COUNTS, 1.0)
    assert noisy["draw_us"] > 10 * one["draw_us"]
    linear = roofline.predict_linear_sample(1, 4096, 151_936, 2.9e-4, (COUNTS, 0.01))
    assert linear["memory_us"] < linear["predicted_us"] == pytest.approx(290)
    assert linear["predicted_us"] < linear["product_and_sample_us"]


def test_predictions_of_the_screen_and_of_listed_tiles():
    """Half the weight's bytes; more tokens take longer, up to the whole weight."""
    tile = Tile(16, 128, 128, 4, 3, 200, 0, 40_960, 2, 100, 600)
    plain = linear_sample_tiles.bounds(tile, (8, 4096, 151_936), 264)
    screen = quantized_head_tiles.screen_bounds(tile, 8)
    assert screen["memory"] / plain["memory"] == pytest.approx(0.5, rel=0.01)
    assert screen["cache"] < plain["cache"]
    few, more, all_of_them = (
        quantized_head_tiles.tile_seconds(tile, share, share) for share in (0.01, 0.5, 1)
    )
    assert 0 < few < more < all_of_them
    assert all_of_them >= plain["memory"]


def test_predictions_of_the_head_and_of_statistics():
    """Many rows cost more than one, and no less than their memory; twice the instructions of what
    waits for memory change nothing."""
    counts = {"row": 100, "program": 300, "behind": 200}
    few, many = (roofline.predict_head(N, 4096, counts) for N in (1, 64))
    assert few["memory_us"] < few["predicted_us"] < many["predicted_us"]
    slow, fast = (roofline.predict_logit_stats(2048, 151_936, n) for n in (4000, 100))
    assert slow["predicted_us"] == slow["issue_us"] > slow["memory_us"]
    assert fast["predicted_us"] == fast["memory_us"]
    assert fast["share_of_one_read"] == 1


def test_sub_tiles_that_reach_the_cut_are_counted():
    z = torch.zeros(2, 600)
    z[0, 0] = z[1, 599] = 100.0  # one sub-tile of three
    assert roofline.reached_share(z) == pytest.approx(1 / 3)
    assert roofline.reached_share(z * 0) == 1


def test_larger_tiles_are_predicted_to_help():
    product = 2.0 * 8192 * 4096 * 128_256 / roofline.CARD["tflops"]
    pointers, hopper = (
        roofline.streaming_seconds(variant, 8192, 4096, 128_256, instructions=2000)
        for variant in (token_stats.POINTERS, token_stats.HOPPER)
    )
    assert product < hopper < pointers
