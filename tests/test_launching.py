"""Launches go through Triton's dispatcher, compile for sm_90, run on the card of their tensors, and
are not waited for."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from autodeco_fast.kernels.device import on_its_device
from tests.op_cases import CAPTURABLE, CASES, NUMBERS, tensors

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = {
    "sample": ["_maxima", "_draw"],
    "sample, maxima": ["_draw"],
    "subtile_maxima": ["_maxima"],
    "linear_sample": ["_tiles", "_settle"],
    "linear_sample, quantized": ["_parts", "_screen", "_list", "_tiles", "_settle"],
    "sample_partial": ["_maxima", "_draw"],
    "logit_stats": ["_logit_stats"] * 2,
    "logit_stats, cut": ["_logit_stats"] * 2,
    "token_stats, fused=True": ["_target", *["_tiles", "_merge"] * 2],
    "token_stats, fused=False": ["_logit_stats"] * 2,
    "token_stats, cut": ["_target", *["_tiles", "_merge"] * 2],
    "target_logits": ["_target"],
    "token_stats_partial": ["_logit_stats"],
    "prob_stats": ["_prob_stats"],
    "temperature_head": ["_slab", "_join", "_backward"],
    "min_p_hinge_loss": ["_hinge"],
    "min_p_hinge_loss, rows": ["_hinge"],
    "nucleus_width_loss": ["_nucleus_width"],
    "linear_nucleus_width_loss": ["_nucleus_width"],
}
BY_NUMBER = {
    "sample": ["_maxima", "_draw"],
    "sample, all cuts": ["_maxima", "_threshold", "_draw"],
    "sample, cuts by row": ["_maxima", "_threshold", "_draw"],
    "linear_sample": ["_tiles", "_settle"],
    "linear_sample, quantized": ["_parts", "_screen", "_list", "_tiles", "_settle"],
    "linear_sample, quantized, no cut": ["_tiles", "_settle"],
    "linear_sample, with logits": ["_maxima", "_draw"],
    "sample_partial": ["_maxima", "_draw"],
    "merge_samples": ["_maxima", "_draw"],
    "token_stats": ["_logit_stats"],
}
# kernel → variants that calls of any number of rows take, with integers of any type and size
VARIANTS = {
    "sample": {"_maxima": 1, "_draw": 1},
    "sample, all cuts": {"_maxima": 1, "_threshold": 1, "_draw": 1},
    "sample, by row": {"_maxima": 1, "_draw": 1},
    "sample, a seed a row": {"_maxima": 1, "_draw": 1},
    "linear_sample, quantized": {"_parts": 1, "_screen": 1, "_list": 1, "_tiles": 1, "_settle": 1},
    "logit_stats": {"_logit_stats": 1},
    "logit_stats, scaled": {"_logit_stats": 1},
    "token_stats": {"_target": 1, "_tiles": 1, "_merge": 1},
    "prob_stats": {"_prob_stats": 1},
    "nucleus_width_loss": {"_nucleus_width": 1},
    "temperature_head": {"_slab": 1, "_join": 1, "_tiles": 1, "_finish": 1},
    "min_p_hinge_loss": {"_hinge": 1},
}


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], dict]:
    """What `python -m tests.launching` saw: (case, kind) → launches, card afterwards, error."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.launching"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    return {(one["case"], one["kind"]): one for one in seen}


def assert_launched(run: dict, kernels: list[str]) -> None:
    assert run["error"] is None, run["error"]
    assert run["launched"] == [
        [name, 1] for name in kernels
    ]  # on the card of the tensors, not on the current one
    assert run["current"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "one strided row"])
@pytest.mark.parametrize("op", CASES)
def test_launches(op, kind, runs):
    # In fp32, as the strided row is, a head's backward is left to the vendor's products.
    of_16_bits = {"_backward"} if kind == "one strided row" else set()
    assert_launched(runs[op, kind], [k for k in LAUNCHES[op] if k not in of_16_bits])


def test_the_kernel_behind_is_launched_early(runs):
    """From compute capability 9 on; those that are waited for are launched as ever."""
    early = {
        case: (run["error"], run["early"]) for (case, kind), run in runs.items() if kind == "Hopper"
    }
    assert early == {
        "sample": (None, ["_draw"]),
        "sample, all cuts": (None, ["_threshold", "_draw"]),
        "subtile_maxima": (None, []),
        "temperature_head": (None, ["_join"]),
    }
    assert not any(run.get("early") for (_, kind), run in runs.items() if kind != "Hopper")


@pytest.mark.parametrize("op", NUMBERS)
def test_launches_with_numbers(op, runs):
    assert_launched(runs[op, "numbers"], BY_NUMBER[op])


@pytest.mark.parametrize("op", VARIANTS)
def test_one_variant_for_any_number_of_rows(op, runs):
    """Of aligned tensors, as torch's own are."""
    assert runs[op, "variants"]["error"] is None, runs[op, "variants"]["error"]
    assert runs[op, "variants"]["variants"] == VARIANTS[op]


def test_a_variant_would_be_seen(runs):
    """The control: logits that are not aligned are read by narrower loads."""
    assert runs["sample, views", "variants"]["variants"] == {"_maxima": 2, "_draw": 2}


def test_variants_of_linear_sample_are_its_tile_shapes(runs):
    """Of 16 rows and of 64."""
    assert runs["linear_sample", "variants"]["error"] is None
    assert runs["linear_sample", "variants"]["variants"] == {"_tiles": 2, "_settle": 2}


@pytest.mark.parametrize("op", CAPTURABLE)
def test_what_has_one_backend_does_not_wait_either(op, runs):
    assert runs[op, "torch"]["error"] is None, runs[op, "torch"]["error"]


def test_a_wait_would_be_seen(runs):
    """The control."""
    controls = {case: run["error"] for (case, kind), run in runs.items() if kind == "control"}
    assert len(controls) == 19
    assert all("the host waits for the device" in (error or "") for error in controls.values()), (
        controls
    )
    fine = {case: run["error"] for (case, kind), run in runs.items() if kind == "no wait"}
    assert fine == dict.fromkeys(("a dtype", "a device", "repeats", "copy"))


def test_fp64_goes_to_the_torch_backend(runs):
    double = {case: run for (case, kind), run in runs.items() if kind == "fp64"}
    assert len(double) == 5
    for case, run in double.items():
        assert (run["error"], run["launched"]) == (None, []), case
        forced = runs[case, "fp64 by triton"]
        assert forced["launched"] == []
        assert (
            forced["error"]
            .rstrip()
            .endswith("backend='triton' takes bfloat16, float16 or float32, got float64")
        )


def test_the_guard_is_the_tensor_s_card(monkeypatch):
    """And costs nothing on a CPU, not even a look at the cards."""
    cards = []
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda card: cards.append(card) or 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda card: cards.append(card) or 0)
    launch = on_its_device(lambda x, y: (list(cards), y))
    assert launch(torch.ones(2), 5) == ([], 5)
    there = types.SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    assert launch(there, y=5) == ([3], 5)
    assert cards == [3, 0]


def test_a_captured_graph_multiplies_ignored_rows_too_and_masks_them(backend, monkeypatch):
    from autodeco_fast.ops import token_stats as op

    t = tensors(7)
    for fused in (True, False):
        call = CASES[f"token_stats, fused={fused}"][1]
        want = call(t, backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr(op, "_capturing", lambda x: True)
            got = call(t, backend=backend)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert (got.rank[t["target"] == -100] == -1).all()
