"""Min-P sampling on CPUs: maxima of tiles, then only the tiles that can hold a survivor, and noise
for survivors alone.

All of that is one call of a compiled loop over rows (`sample_loops.py`), which reads fp32 on the
host. Of other tensors the maxima are taken where they are, and the tiles that reach τ are copied.
"""

import numpy as np
import torch

from autodeco_fast.sampling import (
    CANDIDATE,
    FULL_LOGPROB,
    KEPT,
    LOGPROB,
    SUBTILE,
    Sampled,
    SamplingParameters,
    stream_and_step,
    tensors_and_numbers,
)

from .jit import in_threads
from .sample_loops import BROKEN, sample_rows
from .subtile_maxima import maxima_of_subtiles
from .top_k_top_p import allow, top_k_top_p

_INFINITY = float("inf")
_CHUNK = 1024  # tiles copied at a time, in the caches
_WORTH_A_THREAD = 1 << 20  # logits for each thread that is woken


def sample(
    logits: torch.Tensor,
    parameters: SamplingParameters,
    *,
    allowed: torch.Tensor | None = None,
    first_id: int = 0,
    known_maximum: torch.Tensor | None = None,
    maxima: torch.Tensor | None = None,
    want: int = 0,
) -> Sampled:
    """Same arguments, results and tokens as `kernels.sample.sample`."""
    if allowed is not None:
        logits = allow(logits, allowed)
    (B, V), p, measure = logits.shape, parameters, want & LOGPROB > 0
    stream, step = stream_and_step(p.stream)
    tensors, numbers = tensors_and_numbers(p.temperature, p.min_p, p.seed, p.position, stream)
    T, min_p, *integers = numbers
    token = torch.empty(B, dtype=torch.int64, device="cpu")
    status = torch.empty(B, dtype=torch.int32, device="cpu")
    here = logits.is_cpu and logits.dtype is torch.float32
    waits = not here or p.truncated
    found = torch.empty(7, B, dtype=torch.float64, device="cpu") if want or waits else None

    def draw(
        z: torch.Tensor, maxima: torch.Tensor | None, floor: torch.Tensor | None, lowest: float
    ) -> bool:
        """Whether no row of these fp32 logits holds NaN or +inf."""
        sides = [x if x is None else x.cpu() for x in (maxima, known_maximum, floor, *tensors)]
        call = [z.data_ptr(), z.stride(0), B, V, SUBTILE, first_id]
        call += [0 if x is None else x.data_ptr() for x in sides]
        call += [float(T), float(min_p), *integers, step, lowest, measure]
        call += [token.data_ptr(), status.data_ptr(), 0 if found is None else found.data_ptr()]
        well = []

        def work(rows: slice) -> None:
            well.append(sample_rows(rows.start, rows.stop, *call))

        in_threads(work, B, B * V // _WORTH_A_THREAD)
        return all(well)

    values = logits if here else torch.empty(B, V, device="cpu")
    lowest = _INFINITY if waits else -_INFINITY  # nothing reaches τ before all of it is known
    if not here and maxima is None:
        maxima = maxima_of_subtiles(logits).float()
    seen = None
    if not draw(values, maxima, None, lowest):
        logits, seen = _without_broken(logits, status == BROKEN)
        values = logits if here else values
        maxima = None if here else maxima_of_subtiles(logits).float()
        draw(values, maxima, None, lowest)
    if waits:
        top, _, tau = found[:3].float()
        floor = torch.full_like(top, -_INFINITY)
        if p.truncated:
            floor = top_k_top_p(logits, top[:, None], p).cpu()
        if not here:
            reached = maxima.cpu() >= torch.maximum(tau, floor)[:, None]
            _copy_tiles(logits, reached, values)
        draw(values, maxima, floor, -_INFINITY)
    return _results(logits, token, status if seen is None else status + seen, found, first_id, want)


def _without_broken(
    logits: torch.Tensor, broken: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with −inf for NaN and +inf, which `broken [B]` rows hold; and what was seen in each
    row, 1 for NaN and 2 for +inf, `[B]` int32 on the host."""
    seen, rows = torch.zeros_like(broken, dtype=torch.int32), broken.to(logits.device)
    z, logits = logits[rows], logits.clone()
    seen[broken] = (z.isnan().any(-1).int() + 2 * z.isposinf().any(-1).int()).cpu()
    logits[rows] = z.masked_fill(~(z < _INFINITY), -_INFINITY)
    return logits, seen


def _copy_tiles(z: torch.Tensor, which: torch.Tensor, copy: torch.Tensor) -> None:
    """Writes to `copy [B, V]`, fp32 on the host, these tiles, `[B, tiles]` bool, and no others."""
    width = min(SUBTILE, z.shape[1])
    row, tile = which.nonzero(as_tuple=True)
    start = (tile * SUBTILE).clamp(max=z.shape[1] - width)  # a ragged tile ends where the row does
    for at in zip(row.split(_CHUNK), start.split(_CHUNK)):
        copy.unfold(1, width, 1)[at] = z.unfold(1, width, 1)[at].float().cpu()


def _results(
    logits: torch.Tensor,
    token: torch.Tensor,
    status: torch.Tensor,
    found: torch.Tensor | None,
    first_id: int,
    want: int,
) -> Sampled:
    """What is wanted of the rows, on the device of the logits."""
    logprob, kept, full_logprob, candidate = None, None, None, None
    if want:
        top, T, _, _, logit = found[:5].float().numpy()
        count, mass = found[5:].numpy()
    if want & LOGPROB:
        logprob = np.zeros(len(T), np.float32)
        on = (T > 0) & (count > 0)
        logprob[on] = (logit[on] - top[on]) / T[on] - np.log(mass[on])
        logprob = torch.from_numpy(logprob)
    if want & KEPT:
        kept = torch.from_numpy(np.where(T > 0, count, np.minimum(count, 1)).astype(np.int32))
    if want & FULL_LOGPROB:
        here = torch.from_numpy(T).to(logits.device), token.to(logits.device) - first_id
        full_logprob = _full_logprob(logits, *here)
    if want & CANDIDATE:
        candidate = found[[0, 3, 4]].float()
    out = token, status, logprob, kept, full_logprob, candidate
    return Sampled(
        *out if logits.is_cpu else (x if x is None else x.to(logits.device) for x in out)
    )


def _full_logprob(logits: torch.Tensor, T: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """ln softmax(z/T)_token, of differences of logits, as z/T may be large; 0 in greedy rows and
    where nothing is finite."""
    z = logits.float() - logits.amax(-1, keepdim=True)
    z /= torch.where(T > 0, T, 1.0)[:, None]
    log_p = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)
    return torch.where((T > 0) & log_p.isfinite(), log_p, 0.0)
