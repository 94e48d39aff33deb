"""Every kernel compiles for every target, without spills and with the instructions that were meant. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.resources"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_every_target_without_spills(rows):
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    files = {r["kernel"].split(".")[0] for r in rows}
    assert files == {"logit_stats", "min_p_hinge", "min_p_sample", "temperature_head"}
    assert [r for r in rows if r["spills"]] == []


def test_large_head_uses_the_matrix_unit(rows):
    wide = [r for r in rows if r["kernel"] == "temperature_head._head_partial" and "rows=64" in r["config"]]
    family = {r["target"]: r["matrix"] for r in wide}
    assert family == {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def test_logits_are_read_in_16_bytes(rows):
    for kernel in ("min_p_sample._tile_max", "logit_stats._logit_stats"):
        widths = {r["target"]: r["widest_load_bits"] for r in rows if r["kernel"] == kernel}
        assert min(widths.values()) >= 128, widths
