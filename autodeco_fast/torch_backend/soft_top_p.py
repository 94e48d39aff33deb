"""AutoDeco's soft top-p loss and its gradients, row by row, without a graph over the sort.

With p = softmax(z/T) in descending order, C its running sum, k the steepness, P the predicted
top-p:

    w = e^{−k·relu(C − P)},   A = Σ p w + 1e-9,   q = p_y w_y / A
    loss = −ln(q + 1e-9) · softmax(z)_y  (detached)

    a = [C > P]:         ∂w = −k a w (∂C − ∂P)
    dp = −p (z − E_p z)/T²,   D = running sum of dp
    ∂q/∂P = q k (a_y − Σ a p w / A)
    ∂q/∂T = q (−(z_y − E_p z)/T² − k a_y D_y − (Σ dp w − k Σ a p w D) / A)
"""

import math

import numpy as np
import torch

from autodeco_fast.lm_head import multiply, rows_of_chunk, transform_
from autodeco_fast.numerics import compute_dtype
from autodeco_fast.stats import IGNORED

from .jit import compiled, in_threads
from .running_sums import is_compiled

LOWEST_TEMPERATURE, EPSILON = 1e-8, 1e-9
# Below the largest logit, where p is 0 at any T: what −inf counts as, so that p times it is 0, and
# over the square of the lowest T it is finite.
FAR = 1e20
# Of one block of logits; about eight such live at a time, on CPUs one and three rows a thread.
# There a block stays in the caches, elsewhere it is worth its launches.
CPU_BLOCK_BYTES, BLOCK_BYTES = 4 << 20, 64 << 20


@compiled()
def _place(z, y):
    """Where z_y stands among the sorted, ties in the order of their ids."""
    place, own = 0, z[y]
    for i in range(len(z)):
        place += z[i] > own or (z[i] == own and i < y)
    return place


@compiled()
def _mass(e):
    total = 0.0
    for i in range(len(e)):
        total += e[i]
    return total


@compiled()
def _exponents(p, P, steepness, out):
    """Writes −k·relu(C − P)."""
    C = 0.0
    for i in range(len(p)):
        C += p[i]
        out[i] = -steepness * max(C - P, 0.0)


@compiled()
def _loss_and_slopes(z, p, w, place, T, steepness, weight):
    """loss, ∂loss/∂T, ∂loss/∂P of one row, from its sorted logits and p, and w; where w = 1, C ≤
    P."""
    mean = 0.0
    for i in range(len(z)):
        mean += p[i] * (z[i] - z[0])
    A, cut, D, dp_w, cut_D = 0.0, 0.0, 0.0, 0.0, 0.0
    at_y = (0.0, 0.0, 0.0)
    for i in range(len(z)):
        dp = -p[i] * (z[i] - z[0] - mean) / (T * T)
        D += dp
        pw = p[i] * w[i]
        A += pw
        dp_w += dp * w[i]
        active = 1.0 if w[i] < 1 else 0.0
        cut += active * pw
        cut_D += active * pw * D
        if i == place:
            at_y = (pw, active, D)
    pw_y, a_y, D_y = at_y
    A += EPSILON
    q = pw_y / A
    dq_dT = q * (
        -(z[place] - z[0] - mean) / (T * T) - steepness * a_y * D_y - (dp_w - steepness * cut_D) / A
    )
    dq_dP = q * steepness * (a_y - cut / A)
    outer = -weight / (q + EPSILON)
    return -math.log(q + EPSILON) * weight, outer * dq_dT, outer * dq_dP


def _rows_on_cpu(
    z: np.ndarray, y: np.ndarray, T: np.ndarray, P: np.ndarray, steepness: float
) -> np.ndarray:
    """As `_rows`, fp32, a row at a time in every thread: three buffers [V] each."""
    out = np.empty((3, len(z)), np.float32)

    def work(own: slice) -> None:
        for row in range(own.start, own.stop):
            x, divisor = z[row], max(float(T[row]), LOWEST_TEMPERATURE)
            place = _place(x, y[row])
            ordered = np.negative(x)
            ordered.sort()
            np.negative(ordered, out=ordered)
            np.maximum(ordered, ordered[0] - np.float32(FAR), out=ordered)
            e, w = ordered - ordered[0], np.empty_like(ordered)
            weight = math.exp(e[place]) / _mass(np.exp(e, out=w))
            np.exp(np.divide(e, np.float32(divisor), out=e), out=e)
            e /= np.float32(_mass(e))
            _exponents(e, float(P[row]), steepness, w)
            out[:, row] = _loss_and_slopes(
                ordered, e, np.exp(w, out=w), place, divisor, steepness, weight
            )
            if T[row] <= LOWEST_TEMPERATURE:
                out[1, row] = 0.0

    in_threads(work, len(z), len(z))
    return out


def _rows(z, y, T, P, steepness: float) -> torch.Tensor:
    """loss, ∂loss/∂T, ∂loss/∂P of logits `[n, V]`: `[3, n]`."""
    own = y[:, None]
    z_y = z.gather(1, own)
    weight = (z_y - z.logsumexp(-1, keepdim=True)).exp()
    ids = torch.arange(z.shape[1], device=z.device)
    place = (z > z_y).sum(-1, keepdim=True) + ((z == z_y) & (ids < own)).sum(-1, keepdim=True)
    clamped = T <= LOWEST_TEMPERATURE
    T, P = T.clamp(min=LOWEST_TEMPERATURE)[:, None], P[:, None]
    z = z.sort(-1, descending=True).values
    z.clamp_(min=z[:, :1] - FAR)
    z_y = z.gather(1, place)
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
    logits: torch.Tensor,
    column: torch.Tensor,
    T: torch.Tensor,
    P: torch.Tensor,
    steepness: float,
    scale: float,
    softcap,
) -> torch.Tensor:
    """`[3, N]`: loss and its derivatives in T and P; 0 where the column is −2."""
    dtype = compute_dtype(logits)
    T, P = T.to(dtype), P.to(dtype)
    out = torch.zeros(3, len(logits), dtype=dtype, device=logits.device)
    valid = (column != IGNORED).nonzero()[:, 0]
    if len(valid) == 0:
        return out
    on_cpu = is_compiled(logits)
    as_they_are = (
        on_cpu
        and logits.dtype == torch.float32
        and len(valid) == len(logits)
        and scale == 1.0
        and softcap is None
    )
    block = CPU_BLOCK_BYTES if logits.device.type == "cpu" else BLOCK_BYTES
    rows = max(1, block // (logits.shape[1] * out.element_size()))
    for index in valid.split(len(valid) if as_they_are else rows):
        z = logits if as_they_are else transform_(logits[index], scale, softcap)
        given = z, column[index], T[index], P[index]
        if on_cpu:
            out[:, index] = torch.from_numpy(_rows_on_cpu(*(x.numpy() for x in given), steepness))
        else:
            out[:, index] = _rows(*given, steepness)
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
    """The same from hidden states, `chunk_bytes` of logits at a time; ignored rows are not
    multiplied."""
    out = torch.zeros(3, len(hidden), dtype=compute_dtype(hidden), device=hidden.device)
    valid = (column != IGNORED).nonzero()[:, 0]
    chunk = rows_of_chunk(chunk_bytes, weight, len(valid))
    block = torch.empty(chunk * len(weight), dtype=hidden.dtype, device=hidden.device)
    for index in valid.split(chunk):
        logits = multiply(hidden[index], weight, bias, block)
        out[:, index] = logits_soft_top_p(
            logits, column[index], T[index], P[index], steepness, scale, softcap
        )
    return out
