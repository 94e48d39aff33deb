"""The temperature head in torch, computed in fp32 (fp64 for fp64), in chunks of rows: `[N, F]` is never whole."""

import torch

CHUNK = 4096


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def head_forward(hidden, w1, b1, w2, b2, max_temperature):
    """Same arguments and result as `kernels.temperature_head.head_forward`."""
    kind = _compute_dtype(hidden)
    w1, b1, w2, b2 = (w.to(kind) for w in (w1, b1, w2, b2))
    parts = [torch.addmm(b1, h.to(kind), w1.T).relu_() @ w2 for h in hidden.split(CHUNK)]
    return torch.sigmoid(torch.cat(parts) + b2).mul_(max_temperature)


def head_backward(grad, hidden, w1, b1, w2, T, max_temperature, need_hidden):
    """Same arguments and results as `kernels.temperature_head.head_backward`; the hidden layer is recomputed."""
    kind = _compute_dtype(hidden)
    w1, b1, w2 = (w.to(kind) for w in (w1, b1, w2))
    ds = grad * T * (1 - T / max_temperature)
    dw1, db1, dw2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
    dh = []
    for h, d in zip(hidden.split(CHUNK), ds.split(CHUNK)):
        h = h.to(kind)
        a = torch.addmm(b1, h, w1.T).relu_()
        dw2 += d @ a
        da = d[:, None] * w2 * (a > 0)
        db1 += da.sum(0)
        dw1.addmm_(da.T, h)
        if need_hidden:
            dh.append((da @ w1).to(hidden.dtype))
    return dw1, db1, dw2, ds.sum().view(1), torch.cat(dh) if need_hidden else hidden.new_empty(0)
