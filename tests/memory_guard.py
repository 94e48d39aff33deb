"""A memory checker for kernels in Triton's interpreter: every element that a kernel reads, writes
or updates must be one of a tensor that its launch was given. The padding between rows of a strided
view is none, nor is what lies behind the last row.

The sanitizer of triton-viz 3.0 reasons about all addresses at once, and stops at these kernels
(`Concretize for op idiv is not implemented`: a loop that ends at V // block)."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from triton.runtime import interpreter


def addresses(x: torch.Tensor) -> np.ndarray:
    """Of all its elements."""
    at = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride()):
        at = (at[:, None] + stride * np.arange(size)).reshape(-1)
    return (x.data_ptr() + x.element_size() * at).astype(np.uint64)


def _tensors(values: list) -> Iterator[torch.Tensor]:
    for value in values:
        value = getattr(value, "base", value)  # of a descriptor
        if isinstance(value, torch.Tensor):
            yield value


@contextmanager
def guarded() -> Iterator[SimpleNamespace]:
    """Counts launches and elements; raises `InterpreterError` in a kernel that leaves its
    tensors."""
    seen = SimpleNamespace(launches=0, elements=0)
    own, given = interpreter._interpreter, np.empty(0, np.uint64)
    arguments = interpreter.GridExecutor._init_args_hst

    def register(self, args, kwargs):
        nonlocal given
        on_host, by_name = arguments(self, args, kwargs)
        there = [addresses(x) for x in _tensors([*on_host, *by_name.values()])]
        given, seen.launches = np.unique(np.concatenate(there)), seen.launches + 1
        return on_host, by_name

    def check(what: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        wanted = np.broadcast_to(pointers, mask.shape)[mask].astype(np.uint64)
        seen.elements += wanted.size
        outside = ~np.isin(wanted, given)
        if outside.any():
            raise IndexError(f"{what} {outside.sum()} elements outside of the kernel's tensors")

    def load(pointers, mask, other, dtype):
        check("reads", pointers, mask)
        return own.load(pointers, mask, other, dtype)

    def store(pointers, value, mask):
        check("writes", pointers, mask)
        return own.store(pointers, value, mask)

    def atomic_rmw(operation, pointers, value, mask, sem):
        check("updates", pointers, mask)
        return own.atomic_rmw(operation, pointers, value, mask, sem)

    interpreter._interpreter = SimpleNamespace(load=load, store=store, atomic_rmw=atomic_rmw)
    interpreter.GridExecutor._init_args_hst = register
    try:
        yield seen
    finally:
        interpreter._interpreter = own
        interpreter.GridExecutor._init_args_hst = arguments
