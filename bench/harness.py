"""Interleaved timing, memory peaks, and records that say on what they were taken.

Times are seconds of one call: wall-clock on a CPU; on a GPU between CUDA events, after a write of
256 MB that empties the second-level cache. Variants take turns, so that a slow spell of the machine
hits them all. Memory is the peak above what was held before the call: the allocator's on a GPU, the
process's resident set on a CPU.
"""

import ctypes
import functools
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autodeco_fast.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
_PACKAGES = ("torch", "triton", "numba", "transformers", "autodeco-fast")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_slug() -> str:
    """Folder of this machine's records: the GPU's name, or `cpu`."""
    if device() == "cpu":
        return "cpu"
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")


def _cpu() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, `+changes` if the tree differed from it; unknown outside a checkout."""
    git = lambda *a: subprocess.run(
        ["git", *a], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return commit + ("+changes" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict:
    """Hardware, versions, commit and date."""
    facts = {
        "device": torch.cuda.get_device_name() if device() == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if device() == "cuda":
        facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return facts


@functools.cache
def _eviction() -> torch.Tensor:
    """Larger than any second-level cache."""
    return torch.empty(1 << 28, dtype=torch.int8, device="cuda")


def _seconds(work: Callable[[], object]) -> float:
    if device() == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    _eviction().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


COMPILED = "torch.compile"  # the end of such variants' names


def interleave(
    variants: dict[str, Callable[[], object]], *, samples: int = 20, warmup: int = 2, burst: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds of every variant: median and the 20th and 80th percentile of `samples`, taken in
    turn.

    A turn is `burst` calls in a row, the last of which is timed: with 1, a variant finds the caches
    as the variant before left them (on a GPU empty), with more as its own call before left them.
    Variants whose name ends in "torch.compile" take their turns after all others: on a CPU such
    code can bring threads of its own, which may still hold a core when the next variant begins.
    """
    compiled = {name: work for name, work in variants.items() if name.endswith(COMPILED)}
    others = {name: work for name, work in variants.items() if name not in compiled}
    if compiled and others:
        options = {"samples": samples, "warmup": warmup, "burst": burst}
        return interleave(others, **options) | interleave(compiled, **options)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + samples):
        for name, work in variants.items():
            for _ in range(burst):
                seconds = _seconds(work)
            if turn >= warmup:
                times[name].append(seconds)
    quantile = lambda values, q: float(torch.tensor(values, dtype=torch.float64).quantile(q))
    return {
        n: {"seconds": quantile(v, 0.5), "p20": quantile(v, 0.2), "p80": quantile(v, 0.8)}
        for n, v in times.items()
    }


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak memory of one call above what was held before it. On a CPU (Linux), from the resident
    set."""
    gc.collect()
    if device() == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    held = _resident("VmRSS")
    work()
    return _resident("VmHWM") - held


def copy_bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a large copy on this device."""
    a = torch.ones(n_bytes // 4, device=device())
    b = torch.empty_like(a)
    return 2 * n_bytes / interleave({"copy": lambda: b.copy_(a)}, samples=10)["copy"]["seconds"]


def read_bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes a second of a maximum over a large fp32 array."""
    a = torch.zeros(n_bytes // 4, device=device())
    return n_bytes / interleave({"read": lambda: a.amax()}, samples=10)["read"]["seconds"]


def write_record(path: Path, rows: list[dict], **facts) -> None:
    """Writes `{machine, …facts, rows}` atomically."""
    record = {"machine": machine(), **facts, "rows": rows}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {os.path.relpath(path)}", flush=True)


def record(name: str, rows: list[dict], **facts) -> None:
    """Prints the rows and writes them to this device's folder of `bench/results`."""
    print(markdown(rows), flush=True)
    write_record(RESULTS / device_slug() / f"{name}.json", rows, **facts)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(rows: list[dict]) -> str:
    """A Markdown table; its columns are the keys of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(row.get(key)) for key in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
