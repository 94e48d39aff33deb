"""AutoDeco's two heads: T and top-p, both predicted for every token."""

import os
import shlex
from dataclasses import dataclass

import torch
from torch import nn

from autodeco_fast.autodeco.convert import load_heads
from autodeco_fast.autodeco.own_heads import OWN_FILES, TOP_P_FOLDER, own_heads
from autodeco_fast.checkpoint import fetch
from autodeco_fast.options import documented, option
from autodeco_fast.policies.base import Cut, Picked, Policy
from autodeco_fast.policies.temperature import predicted

_LEAST = torch.finfo(torch.float32).tiny  # the smallest top-p that `sample` takes


@documented
@dataclass(frozen=True, kw_only=True)
class AutoDecoPolicy(Policy):
    """`T = head(h)`, `top-p = top_p_head([h, T, features])`, the features those of `prob_stats`: of
    softmax(z/T), z the model's own logits.

    As AutoDeco's inference has it, the top-p head sees the T that the other one predicts, whatever
    `scale`, `t_min` and `t_max` make of it; the cut keeps top-p of softmax(z/T) at the T that is
    used, z as all other processors leave it. AutoDeco knows no Min-P: the one that the temperature
    head may have been trained for is not taken. A head that is None is switched off: T = 1 without
    the first, no top-p cut without the second.

    Logits are made for the top-p head's sake, and read once more from memory than under a fixed T
    and top-p, for the features (the kernel's second look at a row finds it in the cache). A top-p
    head without enhanced features needs no such read.

    Wang et al. 2025, arXiv:2510.26697.
    """

    kind = "autodeco"
    head: nn.Module | None = option("predicts T `[...]` from hidden states `[..., H]`; or none")
    top_p_head: nn.Module | None = option("a `TopPHead`, predicts top-p; or none", None)
    top_k: int | None = option("top-k cut; None cuts nothing", None, must_be="at least 1")
    folder: str | None = option("where the heads were read, for their text", None)

    def __post_init__(self):
        super().__post_init__()
        if self.head is None and self.top_p_head is None:
            raise ValueError("head and top_p_head must not both be None")
        if self.top_p_head is not None and not hasattr(self.top_p_head, "use_enhanced_features"):
            kind = type(self.top_p_head).__name__
            raise ValueError(f"top_p_head must be a TopPHead, got a {kind}")
        widths = [getattr(each, "hidden_size", None) for each in (self.head, self.top_p_head)]
        first, second = widths
        if None not in widths and first != second:
            raise ValueError(
                f"top_p_head reads hidden states of width {second}, the temperature head of {first}"
            )

    @classmethod
    def load(cls, folder: str | os.PathLike, **options) -> "AutoDecoPolicy":
        """Of what `train --objective autodeco_joint` or `split` wrote, or an AutoDeco checkpoint
        with its base model or without: a folder or hub id.

        Raises:
            ValueError: if there are no such heads, or for an option out of range.
        """
        folder = os.fspath(folder)
        own = own_heads(fetch(folder, "checkpoint", OWN_FILES))
        if own is not None and own.top_p is None:
            raise ValueError(
                f"head folder {folder!r} has no {TOP_P_FOLDER}/: head=FOLDER is one head alone"
            )
        heads = own or load_heads(folder)
        return cls(head=heads.temperature, top_p_head=heads.top_p, folder=folder, **options)

    @property
    def reads_logits(self) -> bool:
        return self.top_p_head is not None and self.top_p_head.use_enhanced_features

    @property
    def cuts_by_row(self) -> bool:
        return self.top_p_head is not None

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor | float:
        return 1.0 if self.head is None else predicted(self.head, hidden)

    def pick(self, hidden: torch.Tensor, logits: torch.Tensor | None = None) -> Picked:
        T = self._ruled(hidden, logits)
        if self.top_p_head is None:
            return Picked(self._in_range(T))
        return Picked(self._in_range(T), predicted_top_p(self.top_p_head, hidden, T, logits))

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        return Cut(min_p=self.min_p, top_k=self.top_k)

    def to(self, device: torch.device) -> "AutoDecoPolicy":
        for head in (self.head, self.top_p_head):
            if head is not None:
                head.to(device)
        return self

    @property
    def hidden_size(self) -> int | None:
        return (self.top_p_head if self.head is None else self.head).hidden_size

    def _words(self) -> list[str]:
        heads = ("head=", "top_p_head=", "folder=")
        options = [word for word in super()._words()[1:] if not word.startswith(heads)]
        return [f"autodeco={shlex.quote(self.folder or '<in memory>')}", *options]


def predicted_top_p(
    top_p_head: nn.Module,
    hidden: torch.Tensor,
    temperature: torch.Tensor,
    logits: torch.Tensor | None,
) -> torch.Tensor:
    """Top-p of `hidden [..., H]`, `[...]` fp32 in (0, 1], on its device; no gradient but the
    head's.

    Args:
        temperature: T as it is predicted, `[...]`.
        logits: the model's own, `[..., V]`; None if the head does not read them.
    """
    device, T = next(top_p_head.parameters()).device, temperature.detach()
    features = None if logits is None else top_p_head.features(logits, T)
    top_p = top_p_head(hidden.to(device), T.to(device), features)
    return top_p.to(device=hidden.device, dtype=torch.float32).clamp(min=_LEAST)
