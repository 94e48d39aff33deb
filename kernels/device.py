"""Launching where the tensors are: Triton takes the current device and never looks at its
arguments'."""

import functools
from collections.abc import Callable

import torch


def on_its_device(launcher: Callable) -> Callable:
    """The launcher, run under the device of its first argument; `launcher` itself for tensors on a
    CPU."""

    @functools.wraps(launcher)
    def launch(x: torch.Tensor, *args, **options):
        if not x.is_cuda:
            return launcher(x, *args, **options)
        with torch.cuda.device_of(x):
            return launcher(x, *args, **options)

    return launch


def capability(x: torch.Tensor) -> tuple[int, int]:
    """The compute capability of NVIDIA's GPU that a tensor is on; (0, 0) elsewhere."""
    is_nvidia = x.is_cuda and torch.version.hip is None
    return torch.cuda.get_device_capability(x.device) if is_nvidia else (0, 0)
