"""The temperature head in torch, computed in fp32 (fp64 for fp64).

Up to `KEEP` rows the hidden layer `[N, F]` is kept for the backward; beyond, both go through chunks
of rows and the backward computes it again.
"""

import torch

from autodeco_fast.numerics import compute_dtype

CHUNK, KEEP = 4096, 16_384  # at F = 256 at most 16 MB are kept


def keeps(rows: int) -> bool:
    """Whether the hidden layer of so many rows is kept."""
    return rows <= KEEP


def _chunks(rows: int) -> list[slice]:
    return [slice(at, min(at + CHUNK, rows)) for at in range(0, rows, CHUNK)]


def _hidden_layer(h, w1, b1, out=None):
    return torch.addmm(b1, h.to(w1.dtype), w1.T, out=out).relu_()


def head_forward(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    max_temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments as `kernels.temperature_head.head_forward`.

    Returns T and the hidden layer, `[0, F]` if it is not kept for the backward.
    """
    N, dtype = len(hidden), compute_dtype(hidden)
    w1, b1, w2, b2 = (w.to(dtype) for w in (w1, b1, w2, b2))
    if N <= CHUNK:
        layer = _hidden_layer(hidden, w1, b1)
        score = torch.mv(layer, w2)
    else:
        layer, score = w1.new_empty(N if keeps(N) else 0, len(w1)), w1.new_empty(N)
        for rows in _chunks(N):
            a = _hidden_layer(hidden[rows], w1, b1, layer[rows] if keeps(N) else None)
            torch.mv(a, w2, out=score[rows])
    return score.add_(b2).sigmoid_().mul_(max_temperature), layer


def head_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    T: torch.Tensor,
    layer: torch.Tensor,
    max_temperature: float,
    need_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments and results as `kernels.temperature_head.head_backward`."""
    N, dtype = len(hidden), compute_dtype(hidden)
    w1, b1, w2 = (w.to(dtype) for w in (w1, b1, w2))
    ds = grad * T * (1 - T / max_temperature)
    dw1, db1, dw2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
    dh = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    for rows in _chunks(N):
        h, d = hidden[rows].to(dtype), ds[rows]
        a = layer[rows] if keeps(N) else _hidden_layer(h, w1, b1)
        dw2 += d @ a
        da = torch.ops.aten.threshold_backward(torch.outer(d, w2), a, 0.0)  # 0 where a is 0
        db1 += da.sum(0)
        dw1.addmm_(da.T, h)
        if need_hidden:
            dh[rows] = (da @ w1).to(hidden.dtype)
    return dw1, db1, dw2, ds.sum().view(1), dh
