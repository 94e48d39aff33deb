"""Watching what a computation stores."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autodeco_fast.generation.lazy import Lazy


class LargestAllocation(TorchDispatchMode):
    """The largest storage behind any result, in elements; of results with `columns` columns only,
    if given."""

    def __init__(self, columns: int | None = None):
        super().__init__()
        self.columns, self.numel = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(o, Lazy) and o.untouched:
                continue
            if isinstance(o, torch.Tensor) and (
                self.columns is None or (o.dim() and o.shape[-1] == self.columns)
            ):
                self.numel = max(self.numel, o.untyped_storage().nbytes() // o.element_size())
        return out
