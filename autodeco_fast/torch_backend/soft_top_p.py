"""AutoDeco's soft top-p loss and its gradients, row by row, without a graph over the sort.

With p = softmax(z/T) in descending order, C its running sum, k the steepness, P the predicted top-p:

    w = e^{−k·relu(C − P)},   A = Σ p w + 1e-9,   q = p_y w_y / A,   loss = −ln(q + 1e-9) · softmax(z)_y  (detached)

    a = [C > P]:         ∂w = −k a w (∂C − ∂P)
    dp = −p (z − E_p z)/T²,   D = running sum of dp
    ∂q/∂P = q k (a_y − Σ a p w / A)
    ∂q/∂T = q (−(z_y − E_p z)/T² − k a_y D_y − (Σ dp w − k Σ a p w D) / A)
"""

import torch

from .compiled import in_threads
from .logit_stats import kind_of, multiply, transform
from .stats_partial import IGNORED

LOWEST_TEMPERATURE, EPSILON = 1e-8, 1e-9
ROWS_BYTES = 4 << 20  # of one block of sorted logits; about eight such blocks live at a time


def _descending(z: torch.Tensor) -> torch.Tensor:
    """Sorted rows. On a CPU by numpy: it sorts values alone, and several times faster than torch."""
    if z.device.type != "cpu":
        return z.sort(-1, descending=True).values
    x = z.neg()
    in_threads(lambda rows: x.numpy()[rows].sort(), len(x), len(x))
    return x.neg_()


def _rows(z, y, T, P, steepness: float) -> torch.Tensor:
    """loss, ∂loss/∂T, ∂loss/∂P of logits `[n, V]`: `[3, n]`."""
    own = y[:, None]
    z_y = z.gather(1, own)
    weight = (z_y - z.logsumexp(-1, keepdim=True)).exp()
    ids = torch.arange(z.shape[1], device=z.device)
    place = (z > z_y).sum(-1, keepdim=True) + ((z == z_y) & (ids < own)).sum(-1, keepdim=True)
    clamped = T <= LOWEST_TEMPERATURE
    T, P = T.clamp(min=LOWEST_TEMPERATURE)[:, None], P[:, None]
    z = _descending(z)
    p = torch.softmax(z / T, -1)
    over = p.cumsum(-1).sub_(P)
    active = over > 0
    pw = over.clamp_(min=0.0).mul_(-steepness).exp_().mul_(p)
    A = pw.sum(-1, keepdim=True) + EPSILON
    q = pw.gather(1, place) / A
    mean = torch.linalg.vecdot(p, z)[:, None]
    ratio = torch.where(p > 0, pw / p, 0.0)  # w
    dp = z.sub_(mean).mul_(p).div_(-T * T)
    D = dp.cumsum(-1)
    cut = pw.mul_(active)
    a_y = active.gather(1, place).to(z.dtype)
    dA = torch.linalg.vecdot(dp, ratio)[:, None] - steepness * torch.linalg.vecdot(cut, D)[:, None]
    dq_dT = q * (-(z_y - mean) / (T * T) - steepness * a_y * D.gather(1, place) - dA / A)
    dq_dP = q * steepness * (a_y - cut.sum(-1, keepdim=True) / A)
    outer = -weight / (q + EPSILON)
    out = torch.cat([-(q + EPSILON).log() * weight, outer * dq_dT, outer * dq_dP], 1).T
    out[1].masked_fill_(clamped, 0.0)
    return out


def logits_soft_top_p(
    logits: torch.Tensor, column: torch.Tensor, T: torch.Tensor, P: torch.Tensor, steepness: float, scale: float, softcap
) -> torch.Tensor:
    """`[3, N]`: loss and its derivatives in T and P; 0 where the column is −2."""
    kind = kind_of(logits)
    T, P = T.to(kind), P.to(kind)
    out = torch.zeros(3, len(logits), dtype=kind, device=logits.device)
    valid = (column != IGNORED).nonzero()[:, 0]
    if len(valid) == 0:
        return out
    rows = max(1, ROWS_BYTES // (logits.shape[1] * out.element_size()))
    for index in valid.split(rows):
        out[:, index] = _rows(transform(logits[index], scale, softcap), column[index], T[index], P[index], steepness)
    return out


def soft_top_p(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    T: torch.Tensor,
    P: torch.Tensor,
    bias: torch.Tensor | None,
    steepness: float,
    scale: float,
    softcap: float | None,
    chunk_bytes: int,
) -> torch.Tensor:
    """The same from hidden states, `chunk_bytes` of logits at a time; ignored rows are not multiplied."""
    out = torch.zeros(3, len(hidden), dtype=kind_of(hidden), device=hidden.device)
    valid = (column != IGNORED).nonzero()[:, 0]
    chunk = min(max(1, chunk_bytes // (len(weight) * hidden.element_size())), max(1, len(valid)))
    block = torch.empty(chunk * len(weight), dtype=hidden.dtype, device=hidden.device)
    for index in valid.split(chunk):
        logits = multiply(hidden[index], weight, bias, block)
        out[:, index] = logits_soft_top_p(logits, column[index], T[index], P[index], steepness, scale, softcap)
    return out
