"""`autodeco-fast doctor`: what is installed, which backend each op will use, and a self-test.

Torch is imported by the functions: the command line's help does without.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "autodeco-fast",
    "torch",
    "triton",
    "numba",
    "transformers",
    "accelerate",
    "safetensors",
)
_MIN_P = 0.3  # of the token that is sampled


def doctor() -> None:
    """Show versions and devices, say which backend each op will use, and test every op."""
    import torch

    for name, version in versions().items():
        typer.echo(f"{name:14} {version}")
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    failed = False
    for device, name in devices.items():
        typer.echo(f"\n{device} ({name}): backend {why(device)}")
        for op, good in self_test(device).items():
            typer.echo(f"  {op:26} {'ok' if good else 'FAILED'}")
            failed |= not good
    if failed:
        raise typer.Exit(1)


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
    import torch

    from autodeco_fast.backends import resolve, triton_available

    backend = resolve(None, torch.empty(0, device=device))
    if backend == "triton":
        return "triton (GPU tensors, triton installed)"
    if not triton_available():
        return "torch (triton is not installed)"
    return "torch (CPU tensors)" if device == "cpu" else "torch (Triton needs a newer GPU)"


def self_test(device: str) -> dict[str, bool]:
    """Every op on small input against a plain torch expression; op → whether they agree."""
    import torch

    torch.manual_seed(0)
    h, w = torch.randn(6, 32, device=device), torch.randn(300, 32, device=device)
    y = torch.randint(0, 300, (6,), device=device)
    return {**_test_statistics(h, w, y), **_test_losses(h, w, y), **_test_samplers(h, w)}


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.double().cpu().allclose(b.double().cpu(), rtol=1e-4, atol=1e-4)


def _test_statistics(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> dict[str, bool]:
    from autodeco_fast import logit_stats, prob_stats, token_stats

    z = h @ w.T
    T = 0.5 + h[:, 0].sigmoid()
    stats = logit_stats(z, y)
    return {
        "logit_stats": _near(stats.logsumexp, z.logsumexp(-1))
        and _near(stats.max_logit, z.amax(-1)),
        "token_stats": _near(token_stats(h, w, y).logsumexp, z.logsumexp(-1)),
        "prob_stats": _near(prob_stats(z, T).max_prob, (z / T[:, None]).softmax(-1).amax(-1)),
    }


def _test_losses(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> dict[str, bool]:
    """The head, and the losses at its temperatures."""
    import torch

    from autodeco_fast import (
        autodeco_temperature_loss,
        logit_stats,
        min_p_hinge_loss,
        nucleus_width_loss,
        soft_top_p_loss,
    )
    from autodeco_fast.ops.temperature_head import temperature_head

    shapes = ((16, 32), (16,), (1, 16), (1,))
    w1, b1, w2, b2 = (torch.randn(shape, device=h.device) for shape in shapes)
    T = temperature_head(h, w1, b1, w2, b2)
    z = h @ w.T
    target = z.gather(1, y[:, None])[:, 0]
    required = (z.amax(-1) - target) / torch.tensor(10.0).log()
    hinge = min_p_hinge_loss(T, logit_stats(z, y), unreachable="clip")
    plain_hinge = (required.clamp(max=2.0) - T).clamp(min=0) + 0.1 * T
    beyond = ((z.amax(-1, keepdim=True) - z) / torch.tensor(10.0).log()).clamp(max=2.0)
    plain_width = (z.softmax(-1) * (beyond - T[:, None]).clamp(min=0)).sum(-1) + 0.1 * T

    warm = T + 0.5
    scaled = z / warm[:, None]
    stats = logit_stats(z, y, temperature=warm)
    cross_entropy = autodeco_temperature_loss(warm, stats, easy_drop=0.0, weighting=None)
    # At steepness 0 nothing is damped: what is left is a weighted cross-entropy.
    soft = soft_top_p_loss(h, w, y, warm, torch.ones_like(T), steepness=0.0)
    prob, scaled_prob = (x.softmax(-1).gather(1, y[:, None])[:, 0] for x in (z, scaled))
    plain_soft = -(scaled_prob + 1e-9).log() * prob
    return {
        "temperature_head": _near(T, 2 * (torch.relu(h @ w1.T + b1) @ w2[0] + b2).sigmoid()),
        "min_p_hinge_loss": _near(hinge, plain_hinge.mean()),
        "nucleus_width_loss": _near(
            nucleus_width_loss(T, z, unreachable="clip"), plain_width.mean()
        ),
        "autodeco_temperature_loss": _near(
            cross_entropy, torch.nn.functional.cross_entropy(scaled, y)
        ),
        "soft_top_p_loss": _near(soft, plain_soft.mean()),
    }


def _test_samplers(h: torch.Tensor, w: torch.Tensor) -> dict[str, bool]:
    from autodeco_fast import linear_sample, sample

    z = h @ w.T
    best, probs = z.argmax(-1), z.softmax(-1)
    token = sample(z, 1.0, min_p=_MIN_P, seed=1).token
    in_kept_set = probs.gather(1, token[:, None])[:, 0] >= _MIN_P * probs.amax(-1) * (1 - 1e-5)
    return {
        "linear_sample": linear_sample(h, w, 0.0, seed=1, fused=True).token.equal(best),
        "sample": bool(in_kept_set.all()) and sample(z, 0.0, seed=1).token.equal(best),
    }
