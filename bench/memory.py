"""Peak memory of a call above what was held before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from bench.machine import device


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))


def peak_bytes(work: Callable[[], object]) -> int:
    """The allocator's on a GPU; on a CPU (Linux) the process's resident set."""
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


def peak_mb(work: Callable[[], object]) -> float | None:
    """MB of `peak_bytes`; None where the system does not tell."""
    try:
        return peak_bytes(work) / 1e6
    except OSError:
        return None
