"""Of ten answers to "Name a US state", how many are right and differ?

    python -m bench.quality.novelty FOLDER [--model FOLDER]

The questions of NoveltyBench whose answers can be listed, and others like them
(`novelty_text.py`). Nothing is drawn to measure: the probability of every spelling of every listed
answer, its end included, is computed under each policy, and from it

    error      the chance of anything that is not listed, mean over questions
    diversity  the entropy of the answers that are, 1 if all on the list are equally likely
    distinct   different listed answers among ten samples, as NoveltyBench counts; 1 is what ten
               draws from the list would give

Hypotheses, written before a policy was measured:

1. Heads rewarded for listed answers to other questions give more distinct ones than the best fixed
   setting: answers are free and ends are forced, and the two are next to each other.
2. Rewarded for listed answers that no other sample gives, they give more still.
3. Heads that learned from the model's own answers, or from records, do not: what is free here was
   not free there.

Every family has at most as many settings as the fixed ones; one is chosen by `distinct` on
validation questions. Intervals are 95 % of resamples of questions and of a head's seeds. What the
folder has already is not made again; the folder of `bench.quality.domains` has heads for it.
"""

import json
from pathlib import Path

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.files import write_text
from autodeco_fast.training.base_model import load_tokenizer
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.run import train_from_files
from bench.quality import novelty_text as texts
from bench.quality.arguments import parsed
from bench.quality.domains import SEEDS

REWARDS = {  # name → reward, β
    "rewards-0.05": ("valid", 0.05),
    "rewards-0.2": ("valid", 0.2),
    "rewards-alone": ("alone", 0.01),
}
ROUNDS = {"rounds": 12, "prompts_per_round": 12, "num_generations": 10, "num_iterations": 3}
LONGEST = 9  # tokens: those of the longest answer in TRAIN, a full stop and an end


def head(work: Path, name: str, seed: int) -> Path:
    """Its folder."""
    return work / "heads" / f"{name}-seed{seed}"


def train(work: Path, model: str) -> None:
    """The heads that learn from rewards and are not there yet."""
    tokenizer, prompts = load_tokenizer(model), work / "novelty-train.jsonl"
    lines = [{"task": q.name, "prompt": q.prompt(tokenizer)} for q in texts.TRAIN]
    write_text(prompts, "".join(json.dumps(line) + "\n" for line in lines))
    for seed in SEEDS:
        for name, (reward, weight) in REWARDS.items():
            config = RewardConfig(
                objective="rewards",
                model=model,
                prompts=prompts,
                reward=f"{texts.__name__}:{reward}",
                entropy_weight=weight,
                max_completion_length=LONGEST,
                stop="\n",
                learning_rate=3e-3,
                seed=seed,
                save_steps=4,
                resume=True,
                output=head(work, name, seed),
                **ROUNDS,
            )
            if not (config.output / CONFIG_NAME).exists():
                train_from_files(config)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(__doc__, "for answers, scans and heads", arguments)
    train(args.folder, args.model)


if __name__ == "__main__":
    main()
