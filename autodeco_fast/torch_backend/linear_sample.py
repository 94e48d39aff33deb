"""Hidden states to tokens on CPUs: the product a chunk of the vocabulary at a time, each chunk
sampled as it comes."""

import torch

from autodeco_fast.torch_backend.logit_stats import transform
from autodeco_fast.torch_backend.sample import sample
from autodeco_fast.vocab_parallel import GREEDY_BELOW, merge, row_of

CHUNK = 1 << 22  # logits held at a time: 16 MB of fp32
COLUMNS = 4096  # narrowest chunk


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: torch.Tensor | float,
    min_p: torch.Tensor | float,
    seed: torch.Tensor | int,
    position: torch.Tensor | int,
    stream: torch.Tensor | int | None,
    *,
    want: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Same arguments and results as `kernels.linear_sample.linear_sample`; logits are rounded to
    the dtype of `weight`.

    A row that stays open in a chunk is multiplied with it again, alone: its logits may differ from
    the first ones in their last bit, its chunk's maximum is never in question (a winner that is the
    maximum is not open).
    """
    B, V = len(hidden), len(weight)
    columns = min(V, max(COLUMNS, CHUNK // max(B, 1)))
    buffer = torch.empty(B * columns, dtype=hidden.dtype, device=hidden.device)
    stream = torch.arange(B, device=hidden.device) if stream is None else stream
    parameters = temperature, min_p, seed, position, stream

    def part(
        start: int, rows: slice | torch.Tensor, known: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict]:
        """Logits of a chunk, and its draw."""
        h, w = hidden[rows], weight[start : start + columns]
        out = buffer[: len(h) * len(w)].view(len(h), len(w))
        if bias is None:
            torch.mm(h, w.T, out=out)
        else:
            torch.addmm(bias[start : start + columns], h, w.T, out=out)
        z = out if logit_scale == 1.0 and softcap is None else transform(out, logit_scale, softcap)
        own = (value[rows] if isinstance(value, torch.Tensor) else value for value in parameters)
        return z, sample(z, *own, first=start, known=known, want=("partial",))

    starts = range(0, V, columns)
    known, mass, parts = None, None, []
    for start in starts:
        z, drawn = part(start, slice(None), known)
        parts.append(drawn)
        known = drawn["partial"][0]
        if "full_logprob" in want:
            here = (z.float() / _heat(temperature, z)).logsumexp(-1)
            mass = here if mass is None else torch.logaddexp(mass, here)
    maximum, score, logit = torch.stack([p["partial"] for p in parts], 1)
    maximum[:] = known  # every chunk knew those before it; τ is that of the whole row
    token = torch.stack([p["token"] for p in parts])
    winner, chosen, open_ = merge(maximum, score, logit, token, temperature, min_p)
    if open_.any():
        for k in open_.any(1).nonzero()[:, 0].tolist():
            rows = open_[k].nonzero()[:, 0]
            again = part(starts[k], rows, known[rows])[1]
            score[k, rows], logit[k, rows], token[k, rows] = *again["partial"][1:], again["token"]
        winner, chosen, _ = merge(maximum, score, logit, token, temperature, min_p)
    status = torch.zeros(B, dtype=torch.int32, device=hidden.device)
    for drawn in parts:
        status |= drawn["status"] & 11  # 4 is decided by all chunks
    status += 4 * (known == -float("inf")).int()
    out = {"token": winner, "status": status}
    if "full_logprob" in want:
        heat = _heat(temperature, chosen[:, None])[:, 0]
        log_p = chosen / heat - mass
        greedy = row_of(temperature, chosen) < GREEDY_BELOW
        out["full_logprob"] = torch.where(greedy | ~log_p.isfinite(), 0.0, log_p)
    return out


def _heat(temperature: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """The divisor of each row, `[B, 1]` or a scalar."""
    T = row_of(temperature, z).clamp(min=GREEDY_BELOW)
    return T[:, None] if T.dim() else T
