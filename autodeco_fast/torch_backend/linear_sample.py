"""Hidden states to tokens on CPUs: the product a chunk of the vocabulary at a time, each chunk sampled as it comes."""

import torch

from autodeco_fast.torch_backend.logit_stats import transform
from autodeco_fast.torch_backend.merge import merge
from autodeco_fast.torch_backend.min_p_sample import min_p_sample

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
    """Same arguments and results as `kernels.linear_sample.linear_sample`; logits are rounded to the dtype of `weight`."""
    B, V = len(hidden), len(weight)
    columns = min(V, max(COLUMNS, CHUNK // max(B, 1)))
    buffer = torch.empty(B * columns, dtype=hidden.dtype, device=hidden.device)

    def chunk(start: int) -> torch.Tensor:
        w = weight[start : start + columns]
        out = buffer[: B * len(w)].view(B, len(w))
        if bias is None:
            torch.mm(hidden, w.T, out=out)
        else:
            torch.addmm(bias[start : start + columns], hidden, w.T, out=out)
        return transform(out, logit_scale, softcap)

    def draw(z: torch.Tensor, start: int, known: torch.Tensor | None) -> dict[str, torch.Tensor]:
        noise = (seed, position, stream)
        return min_p_sample(z, temperature, min_p, *noise, first=start, known=known, want=("partial",))

    starts = range(0, V, columns)
    known, mass, parts = None, None, []
    for start in starts:
        z = chunk(start)
        parts.append(draw(z, start, known))
        known = parts[-1]["partial"][0]
        if "full_logprob" in want:
            here = (z / _heat(temperature, z)).logsumexp(-1)
            mass = here if mass is None else torch.logaddexp(mass, here)
    maximum, score, logit = torch.stack([p["partial"] for p in parts], 1)
    maximum[:] = known  # every chunk knew those before it; τ is that of the whole row
    token = torch.stack([p["token"] for p in parts])
    winner, chosen, open_ = merge(maximum, score, logit, token, temperature, min_p)
    if open_.any():
        for k in open_.any(1).nonzero()[:, 0].tolist():
            again = draw(chunk(starts[k]), starts[k], known)
            score[k], logit[k], token[k] = again["partial"][1], again["partial"][2], again["token"]
        winner, chosen, _ = merge(maximum, score, logit, token, temperature, min_p)
    status = torch.zeros(B, dtype=torch.int32, device=hidden.device)
    for part in parts:
        status |= part["status"] & 3
    status += 4 * (known == -float("inf")).int()
    out = {"token": winner, "status": status}
    if "full_logprob" in want:
        heat = _heat(temperature, chosen[:, None])[:, 0]
        log_p = chosen / heat - mass
        greedy = torch.as_tensor(temperature, device=hidden.device) < 1e-3
        out["full_logprob"] = torch.where(greedy | ~log_p.isfinite(), 0.0, log_p)
    return out


def _heat(temperature: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """The divisor of each row, `[B, 1]` or a scalar."""
    T = torch.as_tensor(temperature, dtype=torch.float32, device=z.device).clamp(min=1e-3)
    return T[:, None] if T.dim() else T
