"""What is installed, which backend each op will use and why, and a self-test in seconds."""

import importlib.metadata
import platform

import torch

from autodeco_fast import (
    autodeco_temperature_loss,
    linear_sample,
    logit_stats,
    min_p_hinge_loss,
    prob_stats,
    sample,
    soft_top_p_loss,
    token_stats,
)
from autodeco_fast.backends import resolve, triton_available
from autodeco_fast.ops.temperature_head import temperature_head

_PACKAGES = (
    "autodeco-fast",
    "torch",
    "triton",
    "numba",
    "transformers",
    "accelerate",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Package → version, or "not installed"."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def why(device: str) -> str:
    """The backend for tensors on `device`, with the reason."""
    backend = resolve(None, torch.empty(0, device=device))
    if backend == "triton":
        return "triton (GPU tensors, triton installed)"
    return "torch (CPU tensors)" if triton_available() else "torch (triton is not installed)"


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double().cpu(), b.double().cpu(), rtol=1e-4, atol=1e-4)


def self_test(device: str) -> dict[str, bool]:
    """Every op on small input against a plain torch expression; op → whether they agree."""
    torch.manual_seed(0)
    h, w = torch.randn(6, 32, device=device), torch.randn(300, 32, device=device)
    y = torch.randint(0, 300, (6,), device=device)
    z = h @ w.T
    stats = logit_stats(z, y)
    w1, b1, w2, b2 = (torch.randn(s, device=device) for s in ((16, 32), (16,), (1, 16), (1,)))
    T = temperature_head(h, w1, b1, w2, b2)
    need = (z.amax(-1) - z.gather(1, y[:, None])[:, 0]) / torch.tensor(10.0).log()
    loss = min_p_hinge_loss(T, stats, unreachable="clip")
    cut = torch.softmax(z, -1)
    drawn = sample(z, 1.0, min_p=0.3, seed=1)
    inside = cut.gather(1, drawn.token[:, None])[:, 0] >= 0.3 * cut.amax(-1) * (1 - 1e-5)
    warm = T + 0.5
    scaled = logit_stats(z, y, temperature=warm)
    cross_entropy = autodeco_temperature_loss(warm, scaled, easy_drop=0.0, weighting=None)
    soft = soft_top_p_loss(
        h, w, y, warm, torch.ones_like(T), steepness=0.0
    )  # nothing is damped: a weighted cross-entropy
    weight = torch.softmax(z, -1).gather(1, y[:, None])[:, 0]
    plain = -((z / warm[:, None]).softmax(-1).gather(1, y[:, None])[:, 0] + 1e-9).log() * weight
    return {
        "temperature_head": _near(T, 2 * torch.sigmoid(torch.relu(h @ w1.T + b1) @ w2[0] + b2)),
        "logit_stats": _near(stats.logsumexp, z.logsumexp(-1))
        and _near(stats.max_logit, z.amax(-1)),
        "token_stats": _near(token_stats(h, w, y).logsumexp, z.logsumexp(-1)),
        "min_p_hinge_loss": _near(loss, ((need.clamp(max=2.0) - T).clamp(min=0) + 0.1 * T).mean()),
        "autodeco_temperature_loss": _near(
            cross_entropy, torch.nn.functional.cross_entropy(z / warm[:, None], y)
        ),
        "soft_top_p_loss": _near(soft, plain.mean()),
        "prob_stats": _near(
            prob_stats(z, warm).max_prob, torch.softmax(z / warm[:, None], -1).amax(-1)
        ),
        "linear_sample": torch.equal(
            linear_sample(h, w, 0.0, seed=1, fused=True).token, z.argmax(-1)
        ),
        "sample": bool(inside.all()) and torch.equal(sample(z, 0.0, seed=1).token, z.argmax(-1)),
    }
