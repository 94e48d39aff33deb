"""Settings of a training run, checked when made. Imports nothing heavy, so that the command line can show the defaults."""

from dataclasses import dataclass
from pathlib import Path


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """How a temperature head is trained. Names follow transformers' `TrainingArguments` where it has them.

    Args:
        model: folder or hub id of a causal language model; it stays frozen, in bf16 and eval mode.
        data: a JSONL file; see `training/rows.py` for its rows.
        output: folder for the head and `metrics.jsonl`; must not hold a head yet.
        min_p: of the cut the head will be used with, in (0, 1).
        gravity: λ, the share of reference tokens allowed to fall outside the cut, ≥ 0.
        max_length: tokens of a row at most; what is beyond is cut off.
        num_train_epochs: passes over the rows.
        max_steps: stop after this many optimizer steps; 0 for no limit.
        per_device_train_batch_size: rows a process runs at once.
        gradient_accumulation_steps: such batches a process adds up before a step.
        learning_rate: AdamW's, at the end of the warm-up; a cosine takes it to zero.
        warmup_ratio: share of the steps that warm up.
        max_rank, trivial_prob, easy_fraction: which tokens to learn from, see `goldilocks_mask`.
        seed: of the head's weights, the order of rows and the choice of trivial tokens.

    Raises:
        ValueError: for a value out of range, one line.
    """

    model: str
    data: Path
    output: Path
    min_p: float = 0.1
    gravity: float = 0.1
    max_length: int = 1024
    num_train_epochs: int = 1
    max_steps: int = 0
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05
    max_rank: int = 100
    trivial_prob: float = 0.9
    easy_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        _require(0 < self.min_p < 1, "min_p", self.min_p, "in (0, 1)")
        _require(self.gravity >= 0, "gravity", self.gravity, "≥ 0")
        _require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        _require(self.max_steps >= 0, "max_steps", self.max_steps, "≥ 0")
        _require(self.max_rank >= 0, "max_rank", self.max_rank, "≥ 0")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_ratio", "trivial_prob", "easy_fraction"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
