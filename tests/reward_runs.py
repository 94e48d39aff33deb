"""Training on rewards, on a tiny model: what its tests share."""

from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model, rewards
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.rollouts import EncodedPrompt, OnPolicy, Rollout
from tests.tiny_models import VOCAB, tiny_model
from tests.training_runs import read_lines


def numbers():
    """A tokenizer whose text is the ids themselves; it has no end of text."""
    words = {str(i): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def even_share(prompts, completions, **columns):
    """The share of even ids."""
    return [sum(int(w) % 2 == 0 for w in c.split()) / len(c.split()) for c in completions]


def config_of(folder: Path, **options) -> RewardConfig:
    options = {"prompts_per_round": 8, "max_completion_length": 12, "rounds": 4, **options}
    source = {} if "rollouts" in options else {"prompts": Path("no"), "reward": "of:test"}
    return RewardConfig(model="", objective="rewards", output=folder, **source, **options)


def some_prompts(n: int = 16) -> list[EncodedPrompt]:
    g = torch.Generator().manual_seed(1)
    lengths = [3 + i % 3 for i in range(n)]
    return [
        EncodedPrompt("", torch.randint(3, VOCAB, (k,), generator=g).tolist(), {}) for k in lengths
    ]


def train(
    folder: Path,
    reward=even_share,
    on_round=lambda metrics: None,
    accelerator=None,
    base=None,
    **options,
):
    """The head and its metrics."""
    config = config_of(folder, **options)
    base = base or base_model.wrap(tiny_model("llama"))
    rounds = OnPolicy(base, numbers(), some_prompts(), reward, config)
    head = rewards.train_on_rewards(
        rounds,
        base,
        config,
        accelerator=accelerator or Accelerator(),
        on_start=lambda rounds, done: None,
        on_round=on_round,
    )
    return head, read_lines(folder / METRICS_NAME)


def rollouts_of(
    config: RewardConfig, prompts: list[EncodedPrompt], tokenizer=None
) -> list[Rollout]:
    base = base_model.wrap(tiny_model("llama"))
    source = OnPolicy(base, tokenizer or numbers(), prompts, even_share, config)
    return source.rollouts(0, TemperatureHead(32, min_p=0.1), 0, 1)
