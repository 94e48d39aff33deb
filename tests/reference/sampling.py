"""Masked Gumbel-max in fp64 on the sampler's own integers: what tokens are compared with."""

import numba
import numpy as np
import torch

from autodeco_fast.torch_backend.sample_loops import gumbel_of, uniform_bits, uniform_of


def kept_set(z, T, min_p=0.0, top_k=0, top_p=1.0):
    """What top-k, then top-p, then Min-P keep of fp64 logits, by sorting. bool [B, V]; T > 0."""
    kept = z.isfinite()
    if top_k:
        kept &= z >= z.topk(min(top_k, z.shape[1]), -1).values[:, -1:]
    p = (z / T[:, None]).masked_fill(~kept, -float("inf")).softmax(-1)
    if top_p < 1:
        ordered = p.sort(-1, descending=True).values
        above = ordered.cumsum(-1) - ordered
        least = torch.where(above < top_p, ordered, 2.0).amin(-1, keepdim=True)
        kept &= p >= least
    return kept & (p >= min_p * p.amax(-1, keepdim=True))


def reference(logits, T, min_p, seed, position=0, **cuts):
    """Tokens by fp64 masked Gumbel-max, and each row's distance between its best two scores."""
    B, V = logits.shape
    z = logits.double()
    row = torch.arange(B).repeat_interleave(V).numpy()
    ids = torch.arange(V).repeat(B).numpy()
    bits = uniform_bits(seed, position, row, ids, 0)
    bits = torch.from_numpy(bits.astype(np.int64)).view(B, V)
    u = ((bits.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    g = -(-torch.log1p(-u)).log()
    T = T.double()[:, None]
    greedy = T < 1e-3
    kept = torch.where(
        greedy, z == z.amax(-1, keepdim=True), kept_set(z, T[:, 0].clamp(min=1e-3), min_p, **cuts)
    )
    score = torch.where(kept, z + torch.where(greedy, 0.0, T) * g, -float("inf"))
    best = score.topk(min(2, V), -1).values
    return score.argmax(-1), best[:, 0] - best[:, -1] if V > 1 else torch.ones(B)


@numba.vectorize
def gumbel(r):
    """The sampler's noise of 32-bit integers."""
    return gumbel_of(uniform_of(r))


def assert_same_tokens(token, want, margin):
    clear = margin > 1e-5
    assert clear.float().mean() > 0.9
    assert token[clear].tolist() == want[clear].tolist()
