"""AutoDeco's released training step, its formulas written plainly: the baseline, and what tests
compare with.

All of it is autograd over `[N, V]` tensors, as released: logits, their softmax at T, a sort and a
running sum.
"""

import torch
import torch.nn.functional as F

from autodeco_fast import TemperatureHead, TopPHead


def temperature_loss(
    z: torch.Tensor, T: torch.Tensor, y: torch.Tensor, kept: torch.Tensor, weighting: str | None
):
    """Mean over the kept rows of `CE(z/T, y)` times the detached probability of y."""
    scaled = z / T.clamp(min=1e-2)[:, None]
    own = y.clamp(min=0)[:, None]
    rows = F.cross_entropy(scaled, own[:, 0], reduction="none")
    if weighting is not None:
        rows = (
            rows
            * (z if weighting == "unscaled" else scaled).softmax(-1).detach().gather(1, own)[:, 0]
        )
    return rows[kept].mean() if kept.any() else rows.sum() * 0.0


def soft_top_p(
    z: torch.Tensor, T: torch.Tensor, P: torch.Tensor, y: torch.Tensor, steepness: float = 30.0
):
    """Mean over the rows with a target."""
    valid = y >= 0
    z, T, P, own = z[valid], T[valid], P[valid], y[valid][:, None]
    p, order = (z / T.clamp(min=1e-8)[:, None]).softmax(-1).sort(dim=-1, descending=True)
    mask = torch.exp(-steepness * F.relu(p.cumsum(-1) - P[:, None]))
    q = p * mask / ((p * mask).sum(-1, keepdim=True) + 1e-9)
    q = torch.zeros_like(q).scatter(1, order, q).gather(1, own)[:, 0]
    return (-torch.log(q + 1e-9) * z.softmax(-1).detach().gather(1, own)[:, 0]).mean()


def joint_features(z: torch.Tensor, T: torch.Tensor) -> list[torch.Tensor]:
    """Largest probability, entropy, variance and mass of the five largest, of softmax(z / (T +
    1e-8))."""
    p = (z / (T.detach() + 1e-8)[:, None]).softmax(-1)
    entropy = -(p * torch.log(p + 1e-8)).sum(-1)
    return [p.amax(-1), entropy, p.var(-1), p.topk(min(5, p.shape[-1]), -1).values.sum(-1)]


def joint_top_p(
    mlp: torch.nn.Module, hidden: torch.Tensor, z: torch.Tensor, T: torch.Tensor
) -> torch.Tensor:
    """Top-p `[N]` of the second head's MLP, which reads h, T and the features."""
    columns = torch.stack([T.detach(), *joint_features(z, T)], -1)
    return torch.sigmoid(mlp(torch.cat([hidden, columns], -1)))[:, 0]


def step(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temp_head: TemperatureHead,
    top_p_head: TopPHead | None = None,
    easy_drop: float = 0.6,
) -> torch.Tensor:
    """Forward and backward of the temperature loss, and of the soft top-p loss if there is a head
    for it."""
    T = temp_head.max_temperature * torch.sigmoid(temp_head.mlp(hidden.float()))[:, 0]
    z = (hidden @ weight.T).float()
    valid = target >= 0
    easy = (z.argmax(-1) == target) & valid
    kept = valid & ~(easy & (torch.rand(len(target), device=target.device) < easy_drop))
    loss = temperature_loss(z, T, target, kept, "unscaled")
    if top_p_head is not None:
        P = joint_top_p(top_p_head.mlp, hidden.float(), z.detach(), T)
        loss = loss + soft_top_p(z, T, P, target)
    loss.backward()
    return loss.detach()
