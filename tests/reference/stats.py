"""Row statistics in fp64: what `logit_stats` and `token_stats` are compared with."""

import math

import torch

IGNORE = -100


def reference(x, y, scale=1.0, softcap=None, T=None, min_p=None):
    """fp64 statistics of fp64 raw logits, in the order of `TokenStats`."""
    z = x.double() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(-1)
    p = (z - lse[:, None]).exp()
    entropy = lse - torch.where(p > 0, p * z, 0.0).sum(-1)
    safe = y.clamp_min(0)
    z_y = z.gather(1, safe[:, None])[:, 0]
    rank = (z > z_y[:, None]).sum(-1)
    out = [z.amax(-1), z.argmax(-1), z_y, lse, rank, entropy]
    if T is not None:
        q = (z / T[:, None]).log_softmax(-1)
        out += [
            T,
            (z / T[:, None]).logsumexp(-1),
            -torch.where(q > -torch.inf, q.exp() * q, 0.0).sum(-1),
        ]
    if min_p is not None:
        out.append((z >= (z.amax(-1) + T * math.log(min_p))[:, None]).sum(-1))
    ignored = y == IGNORE
    out = [o if i == 6 else o.masked_fill(ignored, 0) for i, o in enumerate(out)]
    out[4].masked_fill_(ignored, -1)
    return out


def assert_matches(stats, expected, scale_of_values=1.0):
    eps = 2e-6 * max(1.0, scale_of_values)
    for name, got, want in zip(stats._fields, stats, expected):
        if got.is_floating_point():
            torch.testing.assert_close(
                got.double(), want, rtol=0, atol=eps * 4, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert got.tolist() == want.tolist(), name


def cut_reference(x, y, T, min_p):
    """`scaled_logsumexp`, `scaled_entropy` and `kept` of softmax(z/T) over the kept set alone, by
    masking, in fp64; 0 where ignored."""
    z, top = x.double(), x.double().amax(-1, keepdim=True)
    lowest = top + T[:, None] * math.log(min_p) if min_p > 0 else -torch.inf
    inside = (z >= lowest) & (z > -torch.inf)
    scaled = torch.where(inside, z, 0.0) / T[:, None]
    logsumexp = scaled.masked_fill(~inside, -torch.inf).logsumexp(-1)
    p = torch.where(inside, (scaled - logsumexp[:, None]).exp(), 0.0)
    entropy = logsumexp - (p * scaled).sum(-1)
    return [f.masked_fill(y == IGNORE, 0) for f in (logsumexp, entropy, inside.sum(-1))]
