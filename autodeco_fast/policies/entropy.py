"""Temperatures from the entropy of the row: one more read of the logits."""

from dataclasses import dataclass

import torch

from autodeco_fast.ops.logit_stats import logit_stats
from autodeco_fast.options import documented, option
from autodeco_fast.policies.base import FixedCut


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Of softmax(z), nats, `[..., V]` → `[...]`."""
    rows = logits.reshape(-1, logits.shape[-1])
    target = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    return logit_stats(rows, target).entropy.abs().reshape(logits.shape[:-1])  # no −0: it divides


@documented
@dataclass(frozen=True, kw_only=True)
class EntropyRule(FixedCut):
    """`T = a · H^power`, H the entropy of softmax(z) in nats: hot where the model is unsure.

    The plainest of entropy rules (power 1 and 1/2 are the usual ones), to hold others against.
    """

    kind = "entropy"
    reads_logits = True
    a: float = option("T at an entropy of 1 nat", must_be="positive")
    power: float = option("of the entropy", 1.0, must_be="positive")

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        return self.a * entropies(logits) ** self.power


@documented
@dataclass(frozen=True, kw_only=True)
class EDT(FixedCut):
    """Entropy-based dynamic temperature, `T = T₀ · N^(θ/H)`, H the entropy of softmax(z) in nats:
    T₀ where the model is unsure, greedy where it is sure.

    Zhang, Bao, Huang 2024, arXiv:2403.14541, whose N is 0.8.
    """

    kind = "edt"
    reads_logits = True
    t0: float = option("T₀, T at infinite entropy", must_be="positive")
    theta: float = option("θ, nats", must_be="positive")
    n: float = option("N", 0.8, must_be="in (0, 1)")

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        return self.t0 * self.n ** (self.theta / entropies(logits))  # 0 at an entropy of 0
