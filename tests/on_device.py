"""Ops under test, run where the kernels run: on the GPU if there is one, else on the CPU in
Triton's interpreter.

Tests make their tensors on the CPU; the wrapper takes them to the device and the results back,
gradients included.
"""

import functools

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

import autodeco_fast
from autodeco_fast.ops import temperature_head as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(op):
    """`op` with tensor arguments and results moved; `op` itself where there is no GPU."""
    if DEVICE == "cpu":
        return op
    there = functools.partial(tree_map_only, torch.Tensor, lambda t: t.to(DEVICE))
    back = functools.partial(tree_map_only, torch.Tensor, lambda t: t.cpu())
    return functools.wraps(op)(lambda *args, **options: back(op(*there(args), **there(options))))


def rows_far_apart(near: torch.Tensor, stride: int) -> torch.Tensor:
    """The rows of a tensor, so many numbers apart; of what lies between them no page of a CPU's
    memory is ever touched."""
    size = (len(near) - 1) * stride + near.shape[1]
    if DEVICE == "cpu":
        store = torch.from_numpy(np.empty(size, np.float16)).view(near.dtype)
    else:
        store = torch.zeros(size, dtype=near.dtype, device=DEVICE)
    return store.as_strided(near.shape, (stride, 1)).copy_(near)


sample = on_device(autodeco_fast.sample)
logit_stats = on_device(autodeco_fast.logit_stats)
token_stats = on_device(autodeco_fast.token_stats)
prob_stats = on_device(autodeco_fast.prob_stats)
target_logits = on_device(autodeco_fast.target_logits)
token_stats_partial = on_device(autodeco_fast.token_stats_partial)
merge_token_stats = on_device(autodeco_fast.merge_token_stats)
temperature_head = on_device(op.temperature_head)
min_p_hinge_loss = on_device(autodeco_fast.min_p_hinge_loss)
nucleus_width_loss = on_device(autodeco_fast.nucleus_width_loss)
linear_nucleus_width_loss = on_device(autodeco_fast.linear_nucleus_width_loss)
