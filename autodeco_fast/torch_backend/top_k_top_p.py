"""Top-k and top-p as one threshold a row on CPUs: the same value as `kernels/top_k_top_p.py`.

Top-p sorts only what can matter: all logits below `max z + T·ln((1 − top_p)/V)` together weigh at
most 1 − top_p.
"""

import numpy as np
import torch

from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.sampling import SamplingParameters

LOWEST = np.finfo(np.float32).min
_LARGEST_K, _LEAST_P = 2**31 - 1, np.finfo(np.float32).tiny


def _rows_of(value: torch.Tensor | float, B: int) -> np.ndarray:
    return np.broadcast_to(value.cpu().numpy() if isinstance(value, torch.Tensor) else value, B)


def _weights(values: np.ndarray, top: np.float32, divisor: float) -> np.ndarray:
    return np.exp((values.astype(np.float64) - top) / divisor)


def top_k_top_p(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    parameters: SamplingParameters,
    *,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same arguments and results as `kernels.top_k_top_p.top_k_top_p`."""
    (B, V), top = logits.shape, maxima.amax(-1).float().cpu().numpy()
    if allowed is not None:
        logits = allow(logits, allowed)
    k, p = _rows_of(parameters.top_k, B), _rows_of(parameters.top_p, B)
    wrong = ~((k >= 0) & (k <= _LARGEST_K) & (p >= _LEAST_P) & (p <= 1))
    k, p = np.where(wrong, 0, np.minimum(k, V)), np.where(wrong, 1.0, p)
    temperature = _rows_of(parameters.temperature, B)
    floor = np.full(B, -np.inf, np.float32)
    if (k > 0).any():
        largest = logits.float().topk(int(k.max()), -1).values.cpu().numpy()
        floor = np.where(k > 0, largest[np.arange(B), np.maximum(k, 1) - 1], floor)
    for row in ((p < 1) & (top > -np.inf)).nonzero()[0]:
        divisor = max(GREEDY_BELOW, float(temperature[row]))  # also of NaN
        values = logits[row].float().cpu().numpy()
        values = values[values >= max(floor[row], LOWEST)]
        reach = top[row] + divisor * np.log((1 - float(p[row])) / V)
        likely = np.sort(values[values >= reach])[::-1]
        weights = _weights(likely, top[row], divisor)
        above = np.cumsum(weights) - weights  # what is larger, and ties that stand before
        total = _weights(values, top[row], divisor).sum()
        floor[row] = likely[max(1, above.searchsorted(float(p[row]) * total)) - 1]
    floor[wrong] = np.inf
    return torch.from_numpy(floor.astype(np.float32)).to(logits.device)


def allow(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """−inf where the bit of an id is 0."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = allowed[:, ids // 32] >> (ids % 32).int()
    return logits.masked_fill((bits & 1) == 0, -float("inf"))
