"""What the device can do at most, measured: bytes and floating-point operations a second."""

import functools

import torch

from bench.clock import interleave
from bench.machine import device


@functools.cache
def copy_bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a large copy."""
    a = torch.ones(n_bytes // 4, device=device())
    b = torch.empty_like(a)
    return 2 * n_bytes / interleave({"copy": lambda: b.copy_(a)}, rounds=10)["copy"]["seconds"]


@functools.cache
def read_bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes a second of a maximum over a large fp32 array."""
    a = torch.zeros(n_bytes // 4, device=device())
    return n_bytes / interleave({"read": lambda: a.amax()}, rounds=10)["read"]["seconds"]
