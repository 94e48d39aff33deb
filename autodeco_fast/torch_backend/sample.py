"""Min-P sampling on CPUs: maxima of tiles, then only the tiles that can hold a survivor, and noise
for survivors alone.

All of that is one call of a compiled loop over rows (`sample_loops.py`), which reads fp32 on the
host. Of other tensors the maxima are taken where they are, and the tiles that reach τ are copied.
"""

from typing import NamedTuple

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
)

from .jit import in_threads
from .sample_loops import sample_rows
from .subtile_maxima import maxima_of_subtiles
from .top_k_top_p import allow, top_k_top_p

_CHUNK = 1024  # tiles copied at a time, in the caches
_WORTH_A_THREAD = 1 << 19  # logits for each thread that is woken


class _Rows(NamedTuple):
    """What is asked for each of B rows, and what is found: the last arguments of `sample_rows`."""

    maxima: np.ndarray  # [B, tiles] fp32: of the tiles, NaN or +inf where one is
    asked: np.ndarray  # [4, B] fp32: temperature, Min-P, lower bounds of the maximum and of τ
    noise: np.ndarray  # [3, B] int64: seed, position, stream
    found: np.ndarray  # [5, B] fp32: maximum, T (0 if greedy), τ, score and logit of the token
    token: np.ndarray  # [B] int64
    kept: np.ndarray  # [B] int64: tokens of the kept set
    mass: np.ndarray  # [B] fp64: Σ e^{(z − top)/T} over the kept set, if wanted
    status: np.ndarray  # [B] int32


def _rows_of(
    parameters: SamplingParameters, B: int, V: int, known_maximum: torch.Tensor | None
) -> _Rows:
    p, asked, noise = parameters, np.empty((4, B), np.float32), np.empty((3, B), np.int64)
    asked[2:] = -np.inf
    wanted = [(asked[0], p.temperature), (asked[1], p.min_p), (noise[0], p.seed)]
    wanted += [(noise[1], p.position), (noise[2], np.arange(B) if p.stream is None else p.stream)]
    if known_maximum is not None:
        wanted.append((asked[2], known_maximum))
    for row, value in wanted:
        row[:] = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
    return _Rows(
        maxima=np.empty((B, -(-V // SUBTILE)), np.float32),
        asked=asked,
        noise=noise,
        found=np.empty((5, B), np.float32),
        token=np.empty(B, np.int64),
        kept=np.empty(B, np.int64),
        mass=np.empty(B),
        status=np.empty(B, np.int32),
    )


def _draw(
    z: torch.Tensor, maxima: torch.Tensor | None, rows: _Rows, first_id: int, measure: bool
) -> bool:
    """Fills the rows from fp32 logits on the host; returns whether none has NaN or +inf."""
    (B, V), stride, well = z.shape, z.stride(0), []
    memory = z.as_strided(((B - 1) * stride + V if B else 0,), (1,)).numpy()
    if maxima is not None:
        rows.maxima[:] = maxima.float().cpu()

    def work(some: slice) -> None:
        which = some.start, some.stop, first_id, measure, maxima is not None
        well.append(sample_rows(memory, stride, V, *which, *rows))

    in_threads(work, B, B * V // _WORTH_A_THREAD)
    return all(well)


def _copy_reaching(z: torch.Tensor, rows: _Rows, copy: torch.Tensor) -> None:
    """Writes the tiles that reach τ, and no others."""
    width = min(SUBTILE, z.shape[1])
    row, tile = (rows.maxima >= np.maximum(rows.found[2], rows.asked[3])[:, None]).nonzero()
    start = np.minimum(tile * SUBTILE, z.shape[1] - width)  # a ragged tile ends where the row does
    for some in range(0, len(row), _CHUNK):
        at = tuple(torch.from_numpy(x[some : some + _CHUNK]) for x in (row, start))
        copy.unfold(1, width, 1)[at] = z.unfold(1, width, 1)[at].float().cpu()


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
    here = logits.dtype == torch.float32 and logits.device.type == "cpu"

    def draw(maxima: torch.Tensor | None) -> bool:
        if maxima is None and not here:
            maxima = maxima_of_subtiles(logits)
        values = logits if here else copy
        return _draw(values, maxima, rows, first_id, bool(want & LOGPROB))

    rows, seen = _rows_of(parameters, *logits.shape, known_maximum), 0
    copy = None if here else torch.empty(logits.shape)
    waits = parameters.truncated or not here
    if waits:
        rows.asked[3] = np.inf  # which no token reaches
    if not draw(maxima):
        logits, seen = _without_broken(logits, rows.maxima)
        draw(None)
    if waits:
        tops = torch.from_numpy(rows.maxima)
        cuts = parameters.truncated
        rows.asked[3] = top_k_top_p(logits, tops, parameters).cpu() if cuts else -np.inf
        if not here:
            _copy_reaching(logits, rows, copy)
        draw(tops)
    return _results(logits, rows, seen, first_id, want)


def _results(
    logits: torch.Tensor, rows: _Rows, seen: np.ndarray | int, first_id: int, want: int
) -> Sampled:
    """What is wanted of the rows, on the device of the logits."""

    def there(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(logits.device)

    top, T, _, score, logit = rows.found
    token, logprob, kept, full_logprob, candidate = there(rows.token), None, None, None, None
    if want & LOGPROB:
        values = np.zeros(len(T), np.float32)
        on = (T > 0) & (rows.kept > 0)
        values[on] = (logit[on] - top[on]) / T[on] - np.log(rows.mass[on])
        logprob = there(values)
    if want & KEPT:
        greedy = np.minimum(rows.kept, 1)
        kept = there(np.where(T > 0, rows.kept, greedy).astype(np.int32))
    if want & FULL_LOGPROB:
        full_logprob = _full_logprob(logits, there(T), token - first_id)
    if want & CANDIDATE:
        candidate = there(np.stack([top, score, logit]))
    return Sampled(token, there(rows.status + seen), logprob, kept, full_logprob, candidate)


def _without_broken(logits: torch.Tensor, maxima: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Logits with −inf for NaN and +inf; and what was seen in each row, 1 for NaN and 2 for +inf,
    `[B]` int32."""
    broken = ~(maxima < np.inf).all(1)
    seen = np.zeros(len(logits), np.int32)
    odd = torch.from_numpy(broken).to(logits.device)
    z = logits[odd]
    seen[broken] = (z.isnan().any(-1).int() + 2 * z.isposinf().any(-1).int()).cpu().numpy()
    logits = logits.clone()
    logits[odd] = z.masked_fill(~(z < float("inf")), -float("inf"))
    return logits, seen


def _full_logprob(logits: torch.Tensor, T: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """ln softmax(z/T)_token; 0 in greedy rows and where nothing is finite."""
    z = logits.float() / torch.where(T > 0, T, 1.0)[:, None]
    log_p = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)
    return torch.where((T > 0) & log_p.isfinite(), log_p, 0.0)
