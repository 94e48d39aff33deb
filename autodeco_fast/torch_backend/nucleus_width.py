"""The hinge without labels in torch: results as of `kernels/nucleus_width.py`; also takes fp64.

On CPUs a row is reduced in two passes by `stats_loops.py`: its maximum, then all sums at once.
"""

import numpy as np
import torch

from autodeco_fast.lm_head import transform_
from autodeco_fast.numerics import compute_dtype

from . import stats_loops
from .jit import in_threads
from .running_sums import is_compiled

BLOCK = 1 << 20  # logits at a time, one row at least
_WORTH_A_THREAD = 1 << 17  # logits for each thread that is woken


def nucleus_width(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    max_temperature: float,
    clip: bool,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Same arguments and results as `kernels.nucleus_width.nucleus_width`."""
    N, V = logits.shape
    dtype, untransformed = compute_dtype(logits), scale == 1.0 and softcap is None
    sums = torch.empty(3, N, dtype=dtype, device=logits.device)
    outside = _outside_compiled if is_compiled(logits) else _outside
    rows = max(1, BLOCK // V)
    for start in range(0, N, rows):
        here = slice(start, start + rows)
        # Logits are read where they are, if they can be.
        z = logits[here].to(dtype, copy=not untransformed)
        outside(
            transform_(z, scale, softcap),
            temperature[here],
            inv,
            max_temperature,
            clip,
            sums[:, here],
        )
    reach, mass, width = sums
    pull = reach.mul_(gravity)
    out = torch.stack([width.addcmul_(pull, temperature), pull - mass])
    return out if weight is None else out.mul_(weight).masked_fill_(weight == 0, 0.0)


def _outside_compiled(
    z: torch.Tensor,
    temperature: torch.Tensor,
    inv: float,
    limit: float,
    clip: bool,
    out: torch.Tensor,
) -> None:
    """Into `out` `[3, R]` of every row: Σ p within reach, Σ p [T* > T], Σ p relu(T* − T)."""
    arrays = z.contiguous().numpy(), temperature.numpy(), out.numpy()

    def work(some: slice) -> None:
        values, T, result = arrays[0][some], arrays[1][some], arrays[2][:, some]
        stats_loops.outside(values, T, np.float32(inv), np.float32(limit), clip, result)

    in_threads(work, len(z), z.numel() // _WORTH_A_THREAD)


def _outside(
    z: torch.Tensor,
    temperature: torch.Tensor,
    inv: float,
    limit: float,
    clip: bool,
    out: torch.Tensor,
) -> None:
    """The same in plain torch."""
    top = z.amax(-1, keepdim=True)
    z = z - top.masked_fill_(top == -torch.inf, 0.0)
    p = z.exp()
    share = p.sum(-1).reciprocal_()
    share.masked_fill_(share == torch.inf, 0.0)
    required = z.mul_(-inv)
    if clip:
        required.clamp_(max=limit)
    else:
        p.masked_fill_(required > limit, 0.0)
    torch.mul(p.sum(-1), share, out=out[0])
    beyond = required.sub_(temperature[:, None]).clamp_(min=0.0)
    p.masked_fill_(beyond == 0, 0.0)
    torch.mul(p.sum(-1), share, out=out[1])
    # At −inf the product would be 0·inf.
    beyond.clamp_(max=torch.finfo(z.dtype).max)
    torch.mul(torch.linalg.vecdot(p, beyond), share, out=out[2])
