"""The small kernels one by one: `logit_stats`, the temperature head, the hinge; each against torch
and its physical limit.

python -m bench.kernels

logit_stats       one read of [256, V] logits at the bandwidth of a plain maximum over 1 GiB
temperature head  its first matrix product alone, [N, H]·[H, 256] forward, two such products
backward
hinge             reading 16 and writing 4 bytes a row forward, 20 and 4 backward, at the bandwidth of a large copy
"""

import torch
import torch.nn.functional as F

from autodeco_fast import TemperatureHead, TokenStats, logit_stats, min_p_hinge_loss
from bench.harness import copy_bandwidth, device, interleave, read_bandwidth, record

V, H, N, ROWS = 151_936, 896, 8192, 1 << 20


def eager_stats(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    top, argmax = z.max(-1)
    at_target = z.gather(1, target[:, None])[:, 0]
    lse = z.logsumexp(-1)
    entropy = lse - ((z - lse[:, None]).exp() * z).sum(-1)
    return top, argmax, at_target, lse, (z > at_target[:, None]).sum(-1), entropy


def eager_head(h: torch.Tensor, mlp: torch.nn.Sequential) -> torch.Tensor:
    return 2.0 * torch.sigmoid(mlp(h))[:, 0]


def eager_hinge(T: torch.Tensor, gap: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    need = gap / 2.302585
    kept = (rank >= 0) & (need <= 2.0)
    return (((need - T).relu() + 0.1 * T) * kept).sum() / kept.sum().clamp(min=1)


def backward_of(loss, *leaves):
    """Forward and backward of `loss()`."""
    return lambda: torch.autograd.grad(loss(), leaves)


def report(kernel: str, shape: str, variants: dict, limit_seconds: float | None) -> list[dict]:
    """The first variant is ours. A limit of None means the variant called "limit" is one."""
    times = interleave(variants, samples=20)
    limit = times["limit"]["seconds"] if limit_seconds is None else limit_seconds
    ours = next(iter(times.values()))["seconds"]
    return [
        {
            "kernel": kernel,
            "shape": shape,
            "variant": name,
            "us": 1e6 * t["seconds"],
            "p20": 1e6 * t["p20"],
            "p80": 1e6 * t["p80"],
            "over_ours": t["seconds"] / ours,
            "share_of_limit": limit / t["seconds"],
        }
        for name, t in times.items()
    ]


def stats_rows() -> list[dict]:
    z = torch.randn(256, V, device=device()) * 3
    y = torch.randint(0, V, (256,), device=device())
    compiled = torch.compile(eager_stats)
    variants = {
        "logit_stats": lambda: logit_stats(z, y),
        "eager torch": lambda: eager_stats(z, y),
        "torch.compile": lambda: compiled(z, y),
    }
    return report("logit_stats", f"[256, {V}] fp32", variants, z.numel() * 4 / read_bandwidth())


def head_rows() -> list[dict]:
    h = torch.randn(N, H, device=device())
    head = TemperatureHead(H).to(device())
    torch.nn.init.normal_(head.mlp[2].weight, std=0.1)
    w1, weights = head.mlp[0].weight.detach(), tuple(head.parameters())
    compiled = torch.compile(lambda x: eager_head(x, head.mlp))
    g = torch.randn(N, 256, device=device())
    forward = {
        "temperature_head": lambda: head(h),
        "eager torch": lambda: eager_head(h, head.mlp),
        "torch.compile": lambda: compiled(h),
        "limit": lambda: F.linear(h, w1),
    }
    both = {
        "temperature_head": backward_of(lambda: head(h).sum(), *weights),
        "eager torch": backward_of(lambda: eager_head(h, head.mlp).sum(), *weights),
        "torch.compile": backward_of(lambda: compiled(h).sum(), *weights),
        "limit": lambda: (F.linear(h, w1), g.T @ h),
    }
    shape = f"[{N}, {H}] fp32"
    with torch.no_grad():
        rows = report("temperature head, forward", shape, forward, None)
    return rows + report("temperature head, forward and backward", shape, both, None)


def hinge_rows() -> list[dict]:
    T = torch.rand(ROWS, device=device(), requires_grad=True)
    gap = torch.rand(ROWS, device=device()) * 6
    rank = torch.ones(ROWS, dtype=torch.long, device=device())
    zero = torch.zeros_like(gap)
    stats = TokenStats(gap, rank, zero, gap, rank, zero)
    compiled = torch.compile(eager_hinge)
    variants = {
        "min_p_hinge": backward_of(lambda: min_p_hinge_loss(T, stats), T),
        "eager torch": backward_of(lambda: eager_hinge(T, gap, rank), T),
        "torch.compile": backward_of(lambda: compiled(T, gap, rank), T),
    }
    return report(
        "hinge, forward and backward", f"[{ROWS}] fp32", variants, ROWS * 44 / copy_bandwidth()
    )


def main() -> None:
    torch.manual_seed(0)
    record("kernels", stats_rows() + head_rows() + hinge_rows())


if __name__ == "__main__":
    main()
