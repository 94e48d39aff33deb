"""Every op as a user of torch would write it, in the dtype of its arguments: in fp64 what is exact,
in others what an op may be half as exact as.

Functions take the tensors of `tests/op_cases.py` and return the floats that the op returns.
"""

import math

import torch

from tests.reference.autodeco import joint_features

IGNORE = -100


def assert_no_worse(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, *, size: float = 1.0
) -> None:
    """The largest error is at most twice torch's and one epsilon: of the largest number in sight,
    of those an op returns and of a `size` that it computes with."""
    epsilon = torch.finfo(ours.dtype).eps
    ours, theirs, exact = (x.detach().double() for x in (ours, theirs, exact))
    infinite = exact.isinf()
    assert torch.equal(ours[infinite], exact[infinite])
    error, allowed, largest = (
        x[~infinite].abs().max() for x in (ours - exact, theirs - exact, exact)
    )
    assert ours.isfinite()[~infinite].all()
    assert error <= 2 * allowed + epsilon * max(float(largest), size), (error, allowed, largest)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Logits in the compute dtype, fp32 or fp64."""
    return x if x.dtype == torch.float64 else x.float()


def product(t: dict) -> torch.Tensor:
    return wide(t["hidden"] @ t["weight"].T + t["bias"])


def capped(z: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(z / softcap)


def at_target(z: torch.Tensor, t: dict) -> torch.Tensor:
    return z.gather(1, t["target"].clamp(min=0)[:, None])[:, 0]


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    return -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)


def stats(z: torch.Tensor, t: dict, cut: bool = False) -> list[torch.Tensor]:
    """The floats of `TokenStats` at a temperature."""
    T, top = t["temperature"].to(z.dtype), z.amax(-1, keepdim=True)
    log_p = z.log_softmax(-1)
    inside = z >= top + T[:, None] * math.log(0.1) if cut else torch.ones_like(z).bool()
    x = z.masked_fill(~inside, -torch.inf) / T[:, None]
    of_row = [z.amax(-1), at_target(z, t), z.logsumexp(-1), entropy(log_p)]
    scaled = x.logsumexp(-1), entropy(x.log_softmax(-1)), (x - top / T[:, None]).logsumexp(-1)
    ignored = t["target"] == IGNORE
    found = [x.masked_fill(ignored, 0) for x in (*of_row, *scaled)]
    return [*found[:4], T, *found[4:]]


def moments(t: dict) -> list[torch.Tensor]:
    """Derivatives by T of logsumexp and entropy of z/T, and of its log-probability of the
    target."""
    z = wide(t["logits"])
    T = t["temperature"].to(z.dtype).detach().requires_grad_()
    x = z / T[:, None]
    log_p = x.log_softmax(-1)
    of_row = x.logsumexp(-1), entropy(log_p), at_target(log_p, t)
    rows = [one.masked_fill(t["target"] == IGNORE, 0).sum() for one in of_row]
    return [torch.autograd.grad(one, T, retain_graph=True)[0] for one in rows]


def prob_stats(t: dict) -> list[torch.Tensor]:
    z = wide(t["logits"])
    return joint_features(z, t["temperature"].to(z.dtype))


def head(t: dict) -> list[torch.Tensor]:
    given = [t[n].detach().requires_grad_() for n in ("hidden", "w1", "b1", "w2", "b2")]
    h, w1, b1, w2, b2 = given
    T = 2.0 * torch.sigmoid(torch.relu(h @ w1.T + b1) @ w2[0] + b2)
    return [T, *torch.autograd.grad(T, given, t["grad"].to(T.dtype))]


def with_slope(loss, t: dict, reduction: str) -> list[torch.Tensor]:
    """Rows' weighted losses, or their weighted mean, and the derivative by T."""
    T = t["temperature"].detach().requires_grad_()
    rows, counted = loss(T)
    weight = t["loss_weight"].to(rows.dtype) * counted
    value = rows * weight
    if reduction == "mean":
        value = value.sum() / weight.sum()
    grad = t["grad"].to(value.dtype) if reduction == "none" else None
    return [value.detach(), *torch.autograd.grad(value, T, grad)]


def hinge(t: dict, reduction: str) -> list[torch.Tensor]:
    required = ((t["max_logit"] - t["stat_logit"]) / -math.log(0.1)).clamp(max=2.0)
    return with_slope(
        lambda T: ((required - T).clamp(min=0) + 0.1 * T, t["rank"] >= 0), t, reduction
    )


def width(z: torch.Tensor, t: dict) -> list[torch.Tensor]:
    required = (z.amax(-1, keepdim=True) - z) / -math.log(0.1)
    p = torch.where(required <= 2.0, z.softmax(-1), 0.0)

    def loss(T):
        T = T.to(z.dtype)[:, None]
        return (p * ((required - T).clamp(min=0) + 0.1 * T)).sum(-1), torch.ones(len(z)).bool()

    return with_slope(loss, t, "none")


def soft_top_p(t: dict, steepness: float = 30.0) -> list[torch.Tensor]:
    z = product(t)
    T, P = (t[n].to(z.dtype).detach().requires_grad_() for n in ("temperature", "top_p"))
    p, order = (z / T[:, None]).softmax(-1).sort(dim=-1, descending=True)
    mask = torch.exp(-steepness * (p.cumsum(-1) - P[:, None]).clamp(min=0))
    q = p * mask / ((p * mask).sum(-1, keepdim=True) + 1e-9)
    q = at_target(torch.zeros_like(q).scatter(1, order, q), t)
    rows = -torch.log(q + 1e-9) * at_target(z.softmax(-1), t)
    rows = rows.masked_fill(t["target"] == IGNORE, 0)
    return [rows, *torch.autograd.grad(rows.sum(), (T, P))]


def log_prob(z: torch.Tensor, t: dict, token: torch.Tensor, *, cut: bool) -> torch.Tensor:
    """Of the token that was drawn, in the whole distribution or the kept set."""
    T, top = t["temperature"].to(z.dtype)[:, None], z.amax(-1, keepdim=True)
    if cut:
        z = z.masked_fill(z < top + T * t["min_p"].to(z.dtype)[:, None].log(), -torch.inf)
    return (z / T).log_softmax(-1).gather(1, token[:, None])[:, 0]
