"""Hidden states to tokens on CPUs: the product a chunk of the vocabulary at a time, each chunk
sampled as it comes."""

import torch

from autodeco_fast.lm_head import multiply, transform_
from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.sampling import CANDIDATE, FULL_LOGPROB, Sampled, SamplingParameters
from autodeco_fast.vocab_parallel import SamplePartial, merge_candidates, row_of

from .sample import sample

CHUNK = 1 << 22  # logits that are one chunk: 16 MB of fp32
COLUMNS = 4096  # of a chunk, where there are more: wider ones were slower


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    parameters: SamplingParameters,
    *,
    want: int = 0,
) -> Sampled:
    """Same arguments and results as `kernels.linear_sample.linear_sample`; logits are rounded to
    the dtype of `weight`.

    A row that stays open in a chunk is multiplied with it again, alone: its logits may differ from
    the first ones in their last bit, its chunk's maximum is never in question (a candidate that is
    the maximum is not open).
    """
    B, V = len(hidden), len(weight)
    columns = V if B * V <= CHUNK else min(V, COLUMNS)
    buffer = torch.empty(B * columns, dtype=hidden.dtype, device=hidden.device)
    if parameters.stream is None:
        parameters = parameters._replace(stream=torch.arange(B, device=hidden.device))

    def sampled_chunk(
        start: int, rows: slice | torch.Tensor, known: torch.Tensor | None
    ) -> tuple[torch.Tensor, Sampled]:
        """Logits of a chunk, and what was sampled from them."""
        end = start + columns
        z = multiply(
            hidden[rows], weight[start:end], bias if bias is None else bias[start:end], buffer
        )
        z = z if logit_scale == 1.0 and softcap is None else transform_(z, logit_scale, softcap)
        of_rows = parameters.of_rows(rows)
        return z, sample(z, of_rows, first_id=start, known_maximum=known, want=CANDIDATE)

    # ln Σ e^{(z − top)/T} of the chunks so far: z/T itself may be large
    known, top, log_mass, chunks, starts = None, None, None, [], range(0, V, columns)
    for start in starts:
        z, sampled = sampled_chunk(start, slice(None), known)
        chunks.append(sampled)
        known = sampled.candidate[0]
        if want & FULL_LOGPROB:
            z = z.float().masked_fill(~(z < float("inf")), -float("inf"))  # as the draw takes it
            T, before, top = _divisor(parameters.temperature, z), top, _finite(known)
            here = z.sub_(top).div_(T).logsumexp(-1)
            if log_mass is not None:
                here = torch.logaddexp(log_mass + ((before - top) / T)[:, 0], here)
            log_mass = here
    stacked = torch.stack([chunk.candidate for chunk in chunks], 1)
    candidates = SamplePartial(*stacked, torch.stack([chunk.token for chunk in chunks]))
    candidates.maximum[:] = known  # every chunk knew those before it; τ is that of the whole row
    cut = parameters.temperature, parameters.min_p
    token, logit, still_open = merge_candidates(candidates, *cut)
    if still_open.any():
        for k in still_open.any(1).nonzero()[:, 0].tolist():
            rows = still_open[k].nonzero()[:, 0]
            again = sampled_chunk(starts[k], rows, known[rows])[1]
            _, candidates.score[k, rows], candidates.logit[k, rows] = again.candidate
            candidates.token[k, rows] = again.token
        token, logit, _ = merge_candidates(candidates, *cut)
    status = 4 * (known == -float("inf")).int()
    for chunk in chunks:
        status |= chunk.status & 11  # 4 is decided by all chunks
    full_logprob = None
    if want & FULL_LOGPROB:
        T = _divisor(parameters.temperature, logit[:, None])
        log_p = ((logit[:, None] - _finite(known)) / T)[:, 0] - log_mass
        greedy = row_of(parameters.temperature, logit) < GREEDY_BELOW
        full_logprob = torch.where(greedy | ~log_p.isfinite(), 0.0, log_p)
    return Sampled(token, status, full_logprob=full_logprob)


def _divisor(temperature: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """T of each row, `[B, 1]` or of no dimension, not 0."""
    T = row_of(temperature, z).clamp(min=GREEDY_BELOW)
    return T.expand(len(z))[:, None]


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """`[B, 1]`, what logits are taken relative to: not −inf."""
    return maximum.clamp(min=torch.finfo(torch.float32).min)[:, None]
