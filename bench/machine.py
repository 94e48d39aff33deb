"""On what a record is taken: hardware, versions, commit; and where it goes."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autodeco_fast.training.base_model import frozen_dtype

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
_PACKAGES = ("torch", "triton", "numba", "transformers", "autodeco-fast")
_PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "flashinfer-python")
CARD = {  # what predictions are made for
    "name": "H200, assumed",
    "bytes_per_second": 0.9 * 4.8e12,  # of the vendor's figure
    "multiprocessors": 132,
    "clock": 1.75e9,
    "warp_instructions_per_clock": 4,
    "second_launch_seconds": 2.5e-6,
    "cache_latency_seconds": 4e-7,
    "memory_latency_seconds": 8e-7,  # with the device's memory busy
    "cache_bytes_per_second": 5.5e12,  # second level, all multiprocessors together
    "tflops": 0.8 * 989e12,  # bf16, of the vendor's figure
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def product_dtypes() -> tuple[str, ...]:
    """What matrix products are timed in: bf16 on a GPU; on a CPU fp32, and bf16 unless it is
    emulated there."""
    if device() == "cuda":
        return ("bfloat16",)
    return ("float32",) if frozen_dtype("cpu") == torch.float32 else ("float32", "bfloat16")


def device_slug() -> str:
    """Folder of this machine's records: the GPU's name, or `cpu`."""
    if device() == "cpu":
        return "cpu"
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict:
    """Hardware and versions; nothing that changes from run to run on one machine."""
    found = {
        "device": torch.cuda.get_device_name() if device() == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **{name: _version(name) for name in _PEERS if _version(name)},
    }
    if device() == "cuda":
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def commit_info() -> dict:
    """The commit measured, its time, and whether the tree differs from it outside `bench/results`:
    tracked files, and Python files that git does not know.

    The variable BENCH_COMMIT names the commit of a copy whose git folder is another's, or is not
    there. Then, and without git, `time` and `dirty` are None: nobody can say.
    """
    if "BENCH_COMMIT" in os.environ:
        return {"id": os.environ["BENCH_COMMIT"], "time": None, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {"id": "unknown", "time": None, "dirty": None}
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    unknown = _git("ls-files", "--others", "--exclude-standard", "--", "*.py")
    time = _git("show", "-s", "--format=%cI")
    return {"id": commit, "time": time, "dirty": bool(changes or unknown)}
