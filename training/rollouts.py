"""Rollouts to learn from: completions of prompts, sampled with the head as it is and scored by a
reward function. `training/recorded.py`: those of a file.

A rollout's advantage is its reward less the mean of its group: the completions of one prompt in one
round. Which prompts a round has, and the noise of every
completion, are functions of seed, round and prompt, so a run that was killed and resumed samples
the same.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from autodeco_fast import attach
from autodeco_fast.training.base_model import BaseModel, left_padded, positions
from autodeco_fast.training.data import IGNORED, Example
from autodeco_fast.training.drawing import (
    LeadIn,
    StopStrings,
    completion_text,
    ends_of,
    known_by,
    lead_in,
    plain,
    prefilled,
    stretches,
)
from autodeco_fast.training.prompts import Prompt, encode_prompt
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.reward_function import Completion, rewards_of
from autodeco_fast.training.token_uniform import mixed


class Rollout(NamedTuple):
    """A prompt with a completion, whose tokens are the example's targets."""

    example: Example
    reward: float
    advantage: float
    truncated: bool  # it ended at the limit, not by itself
    # [targets, H]: what the head saw; None where the model has to run over the example for it
    hidden: torch.Tensor | None = None


@dataclass
class _Completed:
    ids: list[int]
    hidden: list[torch.Tensor]  # `[ids, H]` in pieces
    truncated: bool


class EncodedPrompt(NamedTuple):
    given: Completion  # as the reward function gets it
    ids: list[int]
    columns: dict[str, object]  # what else its line has
    lead: LeadIn = LeadIn()


class Rounds(Protocol):
    """Where the rollouts of a round come from."""

    def identity(self) -> dict[str, object]:
        """What they depend on beside the settings, the LM head and the file."""
        ...

    def rollouts(self, round: int, head: nn.Module, rank: int, world: int) -> list[Rollout]:
        """Those of process `rank` of `world`."""
        ...


def advantages(rewards: list[float], scale: bool) -> list[float]:
    """Rewards of a group less their mean, and over their standard deviation where asked for; 0
    where all are equal."""
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)  # the mean may be off by a rounding
    mean = math.fsum(rewards) / len(rewards)
    off = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(x * x for x in off) / len(off))
    return [x / deviation for x in off] if scale and deviation > 0 else off


def chosen(n: int, round: int, *, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(serial number, index) of the `count` prompts of a round: one random order of all n after
    another."""
    orders: dict[int, list[int]] = {}
    for number in range(round * count, (round + 1) * count):
        epoch, at = divmod(number, n)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(mixed(seed, "order", epoch))
            orders[epoch] = torch.randperm(n, generator=generator).tolist()
        yield number, orders[epoch][at]


def prompts_of(
    tokenizer, lines: list[Prompt], base: BaseModel, config: RewardConfig
) -> list[EncodedPrompt]:
    """Prompts as the model takes them; a chat ends where the assistant begins.

    Raises:
        ValueError: naming the line of a prompt that the model or tokenizer cannot take, or that has
            a key which is the reward function's own.
    """
    limits = {
        "vocabulary": base.vocabulary,
        "positions": positions(base.model.config),
        "new_tokens": config.max_completion_length,
    }
    columns = [
        {name: value for name, value in line.fields.items() if name not in ("prompt", "messages")}
        for line in lines
    ]
    names = {name: None for one in columns for name in one}
    found = []
    for line, own in zip(lines, columns):
        if {"prompts", "completions"} & set(own):
            raise ValueError(
                f"prompts, line {line.line}: prompts and completions are what the function is given"
            )
        ids = encode_prompt(tokenizer, line, **limits)
        found.append(
            EncodedPrompt(
                line.content,
                ids,
                {name: own.get(name) for name in names},
                lead_in(tokenizer, line.content, ids),
            )
        )
    return found


@contextmanager
def _hidden_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """`[rows, H]` of every forward: what enters the output embedding at the last position."""
    seen = []

    def see(_, args, kwargs):
        hidden = args[0] if args else next(iter(kwargs.values()))
        seen.append(hidden[:, -1].clone())

    embedding = model.get_output_embeddings()
    # Before the hooks of `attach`, which may hand on something else.
    handle = embedding.register_forward_pre_hook(see, prepend=True, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class OnPolicy:
    """Completions that the model writes with the head."""

    def __init__(
        self,
        base: BaseModel,
        tokenizer,
        prompts: list[EncodedPrompt],
        reward: Callable,
        config: RewardConfig,
    ):
        self.base, self.tokenizer, self.prompts = base, tokenizer, prompts
        self.reward, self.config = reward, config
        stop = [config.stop] if config.stop else []
        self.end = ends_of(base.model, tokenizer, stop)
        self.strings = StopStrings(tokenizer, stop, base.vocabulary, base.weight.device)

    def identity(self) -> dict[str, object]:
        return known_by([prompt.ids for prompt in self.prompts], self.end)

    def rollouts(self, round: int, head: nn.Module, rank: int, world: int) -> list[Rollout]:
        config, model = self.config, self.base.model
        count, seed = config.prompts_per_round, config.seed
        mine = list(chosen(len(self.prompts), round, count=count, seed=seed))[rank::world]
        at_once = max(1, config.generation_batch_size // config.num_generations)
        completions = []
        with plain(model), attach(model, head, min_p=head.min_p):
            for i in range(0, len(mine), at_once):
                completions += self._completions(mine[i : i + at_once])
        return self._scored([self.prompts[index] for _, index in mine], completions)

    @torch.no_grad()
    def _completions(self, some: list[tuple[int, int]]) -> list[_Completed]:
        """Of some prompts, given by serial number and index, prompt by prompt."""
        config, device = self.config, self.base.weight.device
        prompts = [self.prompts[index].ids for _, index in some]
        size, pad = config.num_generations, (self.end or [0])[0]
        ids, mask = left_padded(prompts, pad, device)
        copies = torch.arange(len(prompts), device=device).repeat_interleave(size)
        cache = prefilled(self.base.model, ids, mask, copies)
        seeds = torch.tensor([mixed(config.seed, "noise", number) for number, _ in some])
        streams = torch.arange(size).repeat(len(prompts))
        made = [_Completed([], [], truncated=True) for _ in copies]
        with _hidden_states(self.base.model) as seen:
            for stretch in stretches(
                self.base.model,
                ids[copies],
                mask[copies],
                cache=cache,
                strings=self.strings,
                leads=[self.prompts[index].lead for _, index in some for _ in range(size)],
                eos=torch.tensor(self.end, device=device).long(),
                max_new_tokens=config.max_completion_length,
                of_rows={"seed": seeds.repeat_interleave(size), "stream": streams},
                pad_token_id=pad,
            ):
                hidden, ends = torch.stack(seen, 1), stretch.ends  # [rows, steps, H]
                seen.clear()
                columns = (each.tolist() for each in (stretch.rows, ends.length, ends.ended))
                for at, (row, n, ended) in enumerate(zip(*columns)):
                    made[row].ids += stretch.new[at, :n].tolist()
                    made[row].hidden.append(hidden[at, :n])
                    made[row].truncated = not ended
        return made

    def _scored(self, prompts: list[EncodedPrompt], completions: list[_Completed]) -> list[Rollout]:
        """The completions, `num_generations` of each prompt, with their rewards and advantages."""
        if not prompts:
            return []
        size = self.config.num_generations
        of = [prompt for prompt in prompts for _ in range(size)]
        given = [self._shown(prompt, made.ids) for prompt, made in zip(of, completions)]
        columns = {name: [prompt.columns[name] for prompt in of] for name in of[0].columns}
        asked = [prompt.given for prompt in of]
        rewards = rewards_of(self.reward, self.config.reward, asked, given, columns)
        gained = [
            advantage
            for i in range(0, len(rewards), size)
            for advantage in advantages(rewards[i : i + size], self.config.scale_rewards)
        ]
        found = []
        for prompt, made, reward, advantage in zip(of, completions, rewards, gained):
            labels = [IGNORED] * len(prompt.ids) + made.ids
            example = Example([*prompt.ids, *made.ids], labels)
            hidden = torch.cat(made.hidden)
            found.append(Rollout(example, reward, advantage, made.truncated, hidden))
        return found

    def _shown(self, prompt: EncodedPrompt, ids: list[int]) -> Completion:
        """A completion as the reward function gets it."""
        said = completion_text(
            self.tokenizer, ids, lead=prompt.lead, ends=self.end, stop=self.strings.stop
        )
        if isinstance(prompt.given, str):
            return said
        return [{"role": "assistant", "content": said}]
