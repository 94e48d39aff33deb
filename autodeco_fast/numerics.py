"""Numbers and types that every backend agrees on."""

from contextlib import AbstractContextManager, nullcontext

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels take
ALL_FLOATS = (*FLOATS, torch.float64)  # fp64 is the torch backend's alone

GREEDY_BELOW = 1e-3  # temperatures below are greedy
HIGHEST_TEMPERATURE = 1e29  # z + T·g of a finite z stays finite


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums over these are taken in: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Around products that are taken in the dtypes they are given in."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
