"""A fixed temperature, or a head's, with fixed cuts."""

import os
import shlex
from dataclasses import dataclass

import torch
from torch import nn

from autodeco_fast.heads import DEFAULT_MIN_P, TemperatureHead
from autodeco_fast.options import documented, option
from autodeco_fast.policies.base import FixedCut
from autodeco_fast.policies.temperature import predicted


@documented
@dataclass(frozen=True, kw_only=True)
class Static(FixedCut):
    """The same temperature everywhere: what `generate` does without this library.

    Top-k cuts first, then top-p of what it left, then Min-P.
    """

    kind = "static"
    temperature: float = option("T", must_be="≥ 0")

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> float:
        return self.temperature

    def __str__(self) -> str:
        return "greedy" if self == Static(temperature=0.0) else super().__str__()


@documented
@dataclass(frozen=True, kw_only=True)
class HeadPolicy(FixedCut):
    """`T = head(h)`, cut at the Min-P that the head was trained for.

    `min_p=None` becomes that of the head, 0.1 if it does not know one.
    """

    kind = "head"
    head: nn.Module = option("predicts T `[...]` from hidden states `[..., H]`")
    min_p: float | None = option("Min-P cut at T; None takes the head's", None, must_be="in [0, 1]")
    folder: str | None = option("where the head was read, for its text", None)

    def __post_init__(self):
        super().__post_init__()
        if self.min_p is None:
            known = self.trained_min_p
            object.__setattr__(self, "min_p", DEFAULT_MIN_P if known is None else known)

    @classmethod
    def load(cls, folder: str | os.PathLike, **options) -> "HeadPolicy":
        """Of a head's folder or hub id.

        Raises:
            ValueError: if there is no such head, or for an option out of range.
        """
        folder = os.fspath(folder)
        return cls(head=TemperatureHead.from_pretrained(folder), folder=folder, **options)

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        return predicted(self.head, hidden)

    def to(self, device: torch.device) -> "HeadPolicy":
        self.head.to(device)
        return self

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.head, "hidden_size", None)

    @property
    def trained_min_p(self) -> float | None:
        return getattr(self.head, "min_p", None)

    def _words(self) -> list[str]:
        _, *words = super()._words()
        options = [word for word in words if not word.startswith(("head=", "folder="))]
        return [f"head={shlex.quote(self.folder or '<in memory>')}", *options]
