"""Tokens whose law is known: a context is a coordinate of the hidden state, T* has atoms of given
probability in it, and the (1 − λ)-quantile is one of them."""

import math
from pathlib import Path

import torch
from torch.nn.functional import one_hot

from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.data import Example

MIN_P, GRAVITY = 1e-4, 0.1  # so low a cut that the argmax may be sure and others still reachable
NEVER = 4.0
# T* of the tokens → how many of 100 targets they are. A token with T* = 0.05 and no targets makes
# its context unsure.
LAW = [
    ({0.0: 80, 0.6: 15, 1.2: 5}, 0.6),  # trivial or an error: F(0) = 0.8, F(0.6) = 0.95
    ({0.0: 55, 0.9: 38, 1.5: 7, 0.05: 0}, 0.9),  # never trivial
    ({0.0: 97, 0.8: 3}, 0.0),
    ({0.0: 60, 0.5: 25, 3.0: 15}, 0.5),  # 15 are out of reach: F(0.5) = 0.85 of all, 1 of the rest
]


def law_weight() -> torch.Tensor:
    """The LM head that gives each context the gaps of its atoms."""
    gaps = torch.full((Law.vocabulary, len(LAW)), NEVER * -math.log(MIN_P))
    for context, (atoms, _) in enumerate(LAW):
        gaps[: len(atoms), context] = torch.tensor(list(atoms)) * -math.log(MIN_P)
    return -gaps


class Law(BaseModel):
    """What enters the output embedding is the context, one-hot; its id is the token that comes
    first."""

    vocabulary = 8

    def __init__(self, weight: torch.Tensor | None = None):
        weight = law_weight() if weight is None else weight
        super().__init__(torch.nn.Module(), weight, bias=None, logit_scale=1.0, softcap=None)

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return one_hot(ids.clamp(max=len(LAW) - 1), len(LAW)).float()


def examples(copies: int = 3) -> list[Example]:
    """Every context with its targets, in exact proportion."""
    pairs = [
        (context, target)
        for context, (atoms, _) in enumerate(LAW)
        for target, count in enumerate(atoms.values())
        for _ in range(count * copies)
    ]
    return [Example([context, target], [-100, target]) for context, target in pairs]


def settings(tmp_path: Path, **options) -> TrainConfig:
    options = {
        "min_p": MIN_P,
        "gravity": GRAVITY,
        "output": tmp_path / "out",
        "learning_rate": 0.02,
        "per_device_train_batch_size": 10**6,
        "batch_tokens": 10**6,
        "num_train_epochs": 80,
        **options,
    }
    if "scan" not in options:
        options |= {"model": "", "data": tmp_path / "none"}
    return TrainConfig(**options)
