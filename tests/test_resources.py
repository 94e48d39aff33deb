"""Every kernel compiles for every target, without spills and with the instructions that were meant.
Needs no GPU.

What has not changed since the committed record was made is taken from it; `python -m
bench.resources` compiles everything.
"""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import triton

from autodeco_fast.kernels.dependent_launch import TARGETS
from autodeco_fast.kernels.token_stats import COMPILES_SPECIALIZED

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench/results/resources.json"
FAMILIES = {
    *("linear_sample", "logit_stats", "min_p_hinge", "nucleus_width", "sample"),
    *("prob_stats", "quantized_head", "subtile_maxima", "temperature_head", "token_stats"),
    "top_k_top_p",
}
SETTLE = "linear_sample.settle"
# kernel, configuration, target → bytes a thread that it may spill. `_settle` rarely multiplies a
# tile again, and ptxas saves it registers so that more programs are resident.
EXCUSED: dict[tuple[str, str, str], float] = {
    (SETTLE, "block=128, rows=16, fp32", "sm_80"): 8,
    (SETTLE, "block=128, rows=16, fp32", "sm_100"): 8,
    (SETTLE, "block=128, rows=16, fp32, bias", "sm_100"): 8,
    (SETTLE, "block=128, rows=32", "sm_80"): 16,
    (SETTLE, "block=128, rows=32, bias, softcap, logprob", "sm_80"): 16,
}
if not COMPILES_SPECIALIZED:  # Triton 3.6
    threshold = "top_k_top_p.threshold"
    EXCUSED |= {(threshold, c, t): 8 for c in ("", "dependent=True") for t in ("sm_90", "sm_100")}
    EXCUSED |= {
        (SETTLE, "block=128, rows=64", "sm_100"): 32,
        (SETTLE, "block=128, rows=32, fp32", "sm_100"): 16,
        ("quantized_head.list", "rows=32, list", "gfx942"): 12,
    }


def run(*command: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(record: Path) -> list[dict]:
    return [one["extra_info"] for one in json.loads(record.read_text())["benchmarks"]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """What the compiler says of every kernel and target."""
    path = tmp_path_factory.mktemp("resources") / "resources.json"
    run("-m", "bench.resources", "--known", str(RECORD), "--output", str(path))
    return results(path)


def test_the_record_is_of_these_kernels(compiled):
    """Else `python -m bench.resources --known bench/results/resources.json --output` the same."""
    made_with = json.loads(RECORD.read_text())["machine_info"]["triton"]
    if made_with != triton.__version__:
        pytest.skip(f"the record is of Triton {made_with}")
    assert compiled == results(RECORD)


def test_the_record_is_what_the_compiler_says(compiled, tmp_path):
    """Of two small kernels, compiled anew; nothing is known of a source that has changed."""
    small = "min_p_hinge.", "subtile_maxima."
    record = json.loads(RECORD.read_text())
    for one in record["benchmarks"]:
        if one["name"].startswith(small):
            one["extra_info"] |= {"source": "of another file", "registers": 999, "spills": 999}
    (tmp_path / "changed.json").write_text(json.dumps(record))
    known, output = str(tmp_path / "changed.json"), str(tmp_path / "anew.json")
    run("-m", "bench.resources", "--known", known, "--output", output)
    assert results(Path(output)) == compiled
    assert sum(one["kernel"].startswith(small) for one in compiled) >= 8


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_spills(compiled):
    assert {r["target"] for r in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {r["kernel"].split(".")[0] for r in compiled} == FAMILIES
    spilled = [((r["kernel"], r["config"], r["target"]), r["spills"]) for r in compiled]
    assert EXCUSED.keys() <= dict(spilled).keys()
    assert [(key, n) for key, n in spilled if n > EXCUSED.get(key, 0)] == []


def test_a_spill_would_be_seen():
    """The control: a kernel that keeps 512 live values a thread."""
    code = """
        import triton, triton.language as tl
        from bench.resources import TARGETS, compile_one

        @triton.jit
        def hungry(x_ptr, y_ptr, n, block: tl.constexpr):
            o = tl.arange(0, block)
            b = tl.load(x_ptr + o)
            total = tl.zeros((block,), tl.float32)
            for i in range(n):
                total += tl.cumsum(b * total, 0) + b
            tl.store(y_ptr + o, total + b)

        entry = (hungry, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"block": 16384}, 1, 1)
        targets = ("sm_90", "gfx942")  # each vendor's is read in its own way
        print(all(compile_one(entry, target)["spills"] > 0 for target in targets))
    """
    with tempfile.NamedTemporaryFile(
        "w", suffix=".py"
    ) as file:  # Triton reads a kernel's source from its file
        file.write(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(code))
        file.flush()
        assert run(file.name) == "True\n"


def test_every_block_fits_the_smallest_memory(compiled):
    """AMD's 64 KiB, and the 99 KiB of a block on consumer cards that run code for sm_80."""
    for target, most in (("gfx942", 64 << 10), ("sm_80", 99 << 10)):
        assert max(r["shared_bytes"] for r in compiled if r["target"] == target) <= most


def test_what_is_launched_early_waits_before_it_looks_at_memory(compiled):
    found = [r for r in compiled if r["target"] in TARGETS and "dependent=True" in r["config"]]
    assert [(r["kernel"], r["target"], r["before_memory"]) for r in found] == [
        (kernel, target, instruction)
        for kernel, instruction in (
            ("sample.draw", "wait"),
            ("subtile_maxima.maxima", "launch_dependents"),
            ("temperature_head.slab", "launch_dependents"),
            ("temperature_head.join", "wait"),
            ("top_k_top_p.threshold", "launch_dependents and wait"),
        )
        for target in TARGETS
    ]
    assert {r.get("before_memory") for r in compiled if r not in found} == {"-"}


def test_large_head_uses_the_matrix_unit(compiled):
    wide = [
        r for r in compiled if r["kernel"] == "temperature_head.tiles" and "rows=64" in r["config"]
    ]
    family = {r["target"]: r["matrix"] for r in wide}
    assert family == {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.mark.parametrize(
    "kernel, config", [("linear_sample.tiles", "rows=64"), ("token_stats.tiles", "rows=128")]
)
def test_fused_products_use_the_matrix_unit(kernel, config, compiled):
    family = {
        (r["target"], r["matrix"])
        for r in compiled
        if r["kernel"] == kernel and config in r["config"]
    }
    assert family == {
        ("sm_80", "mma.sync"),
        ("sm_90", "wgmma"),
        ("sm_100", "tcgen05"),
        ("gfx942", "mfma"),
    }


def test_listed_tokens_are_multiplied_as_all_are(compiled):
    """With the same instructions: a logit must not depend on the tile it is in."""
    tiles = [
        (r["target"], r["products"], r["warps"])
        for r in compiled
        if r["kernel"] == "linear_sample.tiles" and "rows=16" in r["config"]
    ]
    assert len(tiles) == 8
    assert len({warps for *_, warps in tiles}) == 2
    assert len({(target, products) for target, products, _ in tiles}) == 4


def test_codes_are_multiplied_as_they_are(compiled):
    """Products of 8-bit integers with 32-bit sums."""
    screen = {(r["target"], r["products"]) for r in compiled if r["kernel"].endswith(".screen")}
    nvidia = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    assert screen >= {(target, nvidia) for target in ("sm_80", "sm_90", "sm_100")}
    on_amd = [products for target, products in screen if target == "gfx942"]
    assert on_amd
    assert all("i32" in products for products in on_amd)


def test_variants_of_the_streaming_statistics(compiled):
    """Hopper's and Blackwell's fetch tiles by bulk copies (TMA), Blackwell's in warps of their
    own."""
    tiles = [r for r in compiled if r["kernel"] == "token_stats.tiles"]
    for config, target, copies in (
        ("block=128, rows=128", "sm_90", "asynchronous"),
        ("block=128, rows=256, described=True, flatten=True", "sm_90", "bulk"),
        ("block=64, rows=128, described=True, flatten=True", "sm_90", "bulk"),
        ("block=128, rows=128, described=True, specialize=True", "sm_100", "bulk, own warps"),
        ("block=64, rows=128, described=True, specialize=True", "sm_100", "bulk, own warps"),
    ):
        expected = {copies} if target != "sm_100" or COMPILES_SPECIALIZED else set()
        assert {
            r["copies"] for r in tiles if (r["config"], r["target"]) == (config, target)
        } == expected


def test_logits_are_read_in_wide_words(compiled):
    """16 bytes a thread of 32 lanes, 8 of 64: 512 bytes a wave either way; `logit_stats`, whose
    tile is larger, 16 of 64 too."""
    for kernel, on_amd in (
        ("subtile_maxima.maxima", 64),
        ("logit_stats.logit_stats", 128),
        ("nucleus_width.nucleus_width", 64),
    ):
        widths = {r["target"]: r["widest_load_bits"] for r in compiled if r["kernel"] == kernel}
        assert widths == {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": on_amd}


def test_logits_are_copied_ahead(compiled):
    """While others are compared or summed; two blocks of the statistics fit a multiprocessor."""
    for kernel, warps in (("subtile_maxima.maxima", 4), ("logit_stats.logit_stats", 8)):
        ours = [r for r in compiled if r["kernel"] == kernel and r["target"] != "gfx942"]
        assert {r["target"] for r in ours} == {"sm_80", "sm_90", "sm_100"}
        assert {r["copies"] for r in ours} == {"asynchronous"}, kernel
        assert min(r["resident_warps"] for r in ours) >= 2 * warps, kernel
