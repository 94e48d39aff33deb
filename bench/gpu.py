"""Everything worth doing on a machine with a GPU: the kernels' tests on the device, its ceilings,
every benchmark.

    python -m bench.gpu --output DIR [STEP …]

A step that fails does not stop the others; its log says why. Records go to `bench/results/<card>`,
and with the logs to DIR.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.clock import interleave
from bench.limits import copy_bandwidth, read_bandwidth
from bench.machine import RESULTS, ROOT, device, device_slug
from bench.records import record

SCRIPTS = ("training", "scan", "generate", "startup")
MICROBENCHMARKS = ["-m", "pytest", "bench", "--benchmark-only", "--benchmark-group-by=group"]
KERNEL_TESTS = (
    *("ops", "logit_stats", "token_stats", "autodeco", "temperature_head", "losses"),
    *("sample", "sample_cuts", "linear_sample", "sample_partial"),
)
STEPS = {
    "tests": ["-m", "pytest", *(f"tests/test_{name}.py" for name in KERNEL_TESTS)],
    "ceilings": ["-m", "bench.gpu", "--ceilings"],
    "kernels": [*MICROBENCHMARKS, f"--benchmark-json={RESULTS / device_slug() / 'kernels.json'}"],
    **{name: ["-m", f"bench.end_to_end.{name}"] for name in SCRIPTS},
}


def ceilings() -> None:
    """Large copy, large read, large bf16 product on random data."""
    n = 8192
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    product = interleave({"product": lambda: a @ b})["product"]["seconds"]
    rows = [
        {"ceiling": "copy, read + written", "GB/s": copy_bandwidth() / 1e9},
        {"ceiling": "read (maximum)", "GB/s": read_bandwidth() / 1e9},
        {"ceiling": f"bf16 product, {n}³", "TFLOP/s": 2 * n**3 / product / 1e12},
    ]
    record("ceilings", rows)


def run(name: str, output: Path, limit: float) -> bool:
    """One step in a process of its own, its output in a log."""
    log = output / f"{name}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *STEPS[name]], cwd=ROOT, stdout=file, stderr=file, timeout=limit
            )
            good = done.returncode == 0
        except subprocess.TimeoutExpired:
            good = False
            file.write(f"\nstopped after {limit:.0f} s\n")
    print(f"{name:12} {'ok' if good else 'FAILED, see ' + str(log)}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"some of {', '.join(STEPS)}; all, if left out"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu-results"),
        help="folder for logs and copies of the records",
    )
    parser.add_argument("--limit", type=float, default=500, help="seconds a step may take")
    parser.add_argument(
        "--ceilings", action="store_true", help="measure the ceilings in this process and stop"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.steps) - set(STEPS))
    if unknown:
        parser.error(f"steps must be among {', '.join(STEPS)}, got {', '.join(unknown)}")
    if device() != "cuda":
        parser.error("no GPU found: `make bench` measures CPUs")
    if args.ceilings:
        return ceilings()
    args.output.mkdir(parents=True, exist_ok=True)
    outcomes = [run(name, args.output, args.limit) for name in args.steps or STEPS]
    if (RESULTS / device_slug()).exists():
        shutil.copytree(RESULTS / device_slug(), args.output / device_slug(), dirs_exist_ok=True)
    sys.exit(0 if all(outcomes) else 1)


if __name__ == "__main__":
    main()
