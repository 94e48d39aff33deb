"""Settings of a training run on rewards; each option is written here, or in config.py where it is
shared."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from autodeco_fast.options import Options, documented, option, option_of
from autodeco_fast.training.config import TrainConfig


@documented
@dataclass(frozen=True, kw_only=True)
class RewardConfig(Options):
    """How a head is trained on rewards: `train --objective rewards`. Names follow TRL's where it
    has them.

    A round samples completions of some prompts with the head as it is, scores them, and ends in one
    optimizer step, or `num_iterations`.
    """

    output: Path = option_of(TrainConfig, "output")
    model: str | None = option_of(TrainConfig, "model")
    objective: str = option_of(TrainConfig, "objective")
    prompts: Path | None = option(
        "JSONL of prompt or messages, and whatever else the reward function takes", None
    )
    reward: str | None = option(
        "module:function or file.py:function that scores completions: it is called with prompts, "
        "completions and every other key of the prompts' lines, a list each, and returns a list of "
        "numbers",
        None,
    )
    rollouts: Path | None = option(
        "JSONL of prompt, completion, reward and if wanted group: recorded rollouts to learn from "
        "instead of prompts and reward",
        None,
    )
    head: Path | None = option_of(TrainConfig, "head")
    min_p: float | None = option_of(TrainConfig, "min_p")
    rounds: int = option("rounds of rollouts", 40, must_be="at least 1")
    prompts_per_round: int = option(
        "prompts of a round, or groups of rollouts", 8, must_be="at least 1"
    )
    num_generations: int = option(
        "completions a prompt in a round; their mean reward is the baseline",
        8,
        must_be="at least 2",
    )
    max_completion_length: int = option("tokens of a completion", 64, must_be="at least 1")
    stop: str | None = option(
        "text or special token that ends a completion, as the end-of-sequence token does; the "
        "reward function is given what stands before it",
        None,
    )
    generation_batch_size: int = option(
        "completions that a process generates at once", 256, must_be="at least 1"
    )
    batch_tokens: int = option(
        "tokens of a forward pass over rollouts, padding included", 8192, must_be="at least 1"
    )
    scale_rewards: bool = option(
        "divide advantages by the standard deviation of the rewards of their group", False
    )
    entropy_weight: float = option(
        "β, what a nat of entropy a token is worth in rewards", 0.01, must_be="≥ 0"
    )
    target_entropy: float | None = option(
        "mean nats a token to hold: entropy then weighs 10 times entropy_weight times the share of "
        "it that is lacking",
        None,
        must_be="positive",
    )
    num_iterations: int = option(
        "optimizer steps a round, over the same rollouts", 1, must_be="at least 1"
    )
    epsilon: float = option(
        "from the second of them on: how far a token's probability may move from the one it was "
        "sampled with, as a share of it, and still be rewarded for moving",
        0.2,
        must_be="in (0, 1)",
    )
    learning_rate: float = option_of(TrainConfig, "learning_rate")
    lr_scheduler_type: str = option_of(TrainConfig, "lr_scheduler_type")
    warmup_ratio: float = option_of(TrainConfig, "warmup_ratio")
    save_steps: int = option_of(TrainConfig, "save_steps")
    save_total_limit: int = option_of(TrainConfig, "save_total_limit")
    report_to: str = option_of(TrainConfig, "report_to")
    resume: bool = option_of(TrainConfig, "resume")
    seed: int = option_of(TrainConfig, "seed")

    diagnostics: ClassVar[int] = 0  # there are none of T*

    def __post_init__(self):
        super().__post_init__()
        if self.objective != "rewards":
            raise ValueError(
                f"objective must be rewards for these settings, got {self.objective!r}"
            )
        if self.model is None:
            raise ValueError("model must be given: rewards are of what it writes")
        on_policy = self.prompts is not None and self.reward is not None
        one_of_both = (self.prompts is None) != (self.reward is None)
        if one_of_both or on_policy == (self.rollouts is not None):
            raise ValueError("give either prompts and reward, or rollouts")
        if self.target_entropy is not None and not self.entropy_weight:
            raise ValueError("target_entropy needs an entropy_weight above 0, got 0")
