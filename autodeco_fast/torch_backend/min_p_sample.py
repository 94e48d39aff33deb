"""Min-P sampling in torch: tile maxima first, then only the tiles and tokens that can survive. Noise for survivors alone."""

import torch

from .philox import gumbel

TILE = 128
GREEDY_BELOW = 1e-3
_CHUNK = 1 << 21  # survivors handled at a time: min_p = 0 keeps every token, and Philox wants 64-bit words


def _tile_maxima(z: torch.Tensor) -> torch.Tensor:
    """`[B, ceil(V / TILE)]`; a ragged last tile is shorter."""
    V = z.shape[1]
    whole = V // TILE * TILE
    parts = [z[:, :whole].unflatten(1, (-1, TILE)).amax(-1)] if whole else []
    if whole < V:
        parts.append(z[:, whole:].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _survivors(z: torch.Tensor, tile_max: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and ids (ascending within a row) of the tokens with z ≥ τ and z > −inf."""
    V = z.shape[1]
    row, tile = ((tile_max >= tau[:, None]) & (tile_max > -float("inf"))).nonzero(as_tuple=True)
    ids = tile[:, None] * TILE + torch.arange(TILE, device=z.device)
    inside = z[row[:, None], ids.clamp(max=V - 1)].float()
    keep = (inside >= tau[row, None]) & (inside > -float("inf"))
    if V % TILE:
        keep &= ids < V
    at, column = keep.nonzero(as_tuple=True)
    return row[at], tile[at] * TILE + column


def _draw(
    z: torch.Tensor,
    tile_max: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """token, logprob, kept of rows without NaN or +inf."""
    B, V = z.shape
    top = tile_max.amax(-1).float()
    greedy = temperature < GREEDY_BELOW
    T = temperature.masked_fill(greedy, 0.0)
    tau = top + (temperature * min_p.log()).masked_fill_(greedy, 0.0)
    row, ids = _survivors(z, tile_max, tau)
    logit = z[row, ids].float()
    noise = gumbel(seed[row], position[row], stream[row], ids)
    score = torch.addcmul(logit, T[row], noise)
    best = torch.full_like(top, -float("inf")).scatter_reduce_(0, row, score, "amax")
    won = score == best[row]
    token = torch.full((B,), V, dtype=torch.int64, device=z.device).scatter_reduce_(0, row[won], ids[won], "amin")
    alive = token < V
    token = torch.where(alive, token, 0)
    divisor = temperature.clamp(min=GREEDY_BELOW)
    mass = torch.zeros_like(top).index_add_(0, row, ((logit - top[row]) / divisor[row]).exp_())
    sampled = alive & ~greedy
    kept = torch.where(sampled, torch.bincount(row, minlength=B).int(), alive.int())
    logprob = (z.gather(1, token[:, None])[:, 0].float() - top) / divisor - mass.log()
    return token, torch.where(sampled, logprob, 0.0), kept


def min_p_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments, results and tokens as `kernels.min_p_sample.min_p_sample`."""
    B, V = logits.shape
    tile_max = _tile_maxima(logits)
    top = tile_max.amax(-1)  # amax hands NaN on, so a row without NaN or +inf costs no second look
    status = torch.zeros(B, dtype=torch.int32, device=logits.device)
    if not bool((top < float("inf")).all()):
        odd = ~(top < float("inf"))
        z = logits[odd]
        status[odd] = z.isnan().any(-1).int() + 2 * z.isposinf().any(-1).int()
        logits = logits.clone()
        logits[odd] = z.masked_fill(~(z < float("inf")), -float("inf"))
        tile_max = _tile_maxima(logits)
    rows = [temperature, min_p, seed, position, stream]
    if V * B <= _CHUNK or bool((min_p > 1e-4).all()):
        token, logprob, kept = _draw(logits, tile_max, *rows)
    else:
        step = max(1, _CHUNK // V)
        parts = [
            _draw(logits[i : i + step], tile_max[i : i + step], *(r[i : i + step] for r in rows)) for i in range(0, B, step)
        ]
        token, logprob, kept = (torch.cat(p) for p in zip(*parts))
    return token, logprob, kept, status + 4 * (tile_max.amax(-1) == -float("inf")).int()
