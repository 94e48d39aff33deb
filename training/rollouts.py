"""Rollouts to learn from: completions of prompts, sampled with the head as it is and scored by a
reward function, or recorded ones with their rewards.

A rollout's advantage is its reward less the mean of its group: the completions of one prompt in one
round, or the recorded ones of a group. Which prompts a round has, and the noise of every
completion, are functions of seed, round and prompt, so a run that was killed and resumed samples
the same.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria

from autodeco_fast import attach
from autodeco_fast.errors import foreign, parse_json
from autodeco_fast.training.base_model import BaseModel, example_length, positions
from autodeco_fast.training.data import IGNORED, Example, complaint_of, encode
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.reward_function import Completion, rewards_of
from autodeco_fast.values import finite, text


class Rollout(NamedTuple):
    """A prompt with a completion, whose tokens are the example's targets."""

    example: Example
    reward: float
    advantage: float
    truncated: bool  # it ended at the limit, not by itself


class Prompt(NamedTuple):
    given: Completion  # as the reward function gets it
    ids: list[int]
    columns: dict[str, object]  # what else its line has


class Rounds(Protocol):
    """Where the rollouts of a round come from."""

    def rollouts(self, round: int, head: nn.Module, rank: int, world: int) -> list[Rollout]:
        """Those of process `rank` of `world`."""
        ...


def advantages(rewards: list[float], scale: bool) -> list[float]:
    """Rewards of a group less their mean, and over their standard deviation where asked for."""
    mean = math.fsum(rewards) / len(rewards)
    off = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(x * x for x in off) / len(off))
    return [x / deviation for x in off] if scale and deviation > 0 else off


def mixed(*parts: object) -> int:
    """63 bits that depend on all the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def chosen(n: int, round: int, *, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(serial number, index) of the `count` prompts of a round: one random order of all n after
    another."""
    for number in range(round * count, (round + 1) * count):
        epoch, at = divmod(number, n)
        generator = torch.Generator().manual_seed(mixed(seed, "order", epoch))
        yield number, int(torch.randperm(n, generator=generator)[at])


def _lines(name: str, path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of the lines of a JSONL file.

    Raises:
        ValueError: if it is no such file, or has none.
    """
    if not path.is_file():
        raise ValueError(f"{name} must be a JSONL file, got {str(path)!r}, which is no file")
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            found = parse_json(line, where)
            if not isinstance(found, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(found).__name__}")
            text(where, json.dumps(found, ensure_ascii=False))
            empty = False
            yield where, found
    if empty:
        raise ValueError(f"{name} must have at least one line, {path} has none")


def read_prompts(path: Path) -> list[dict]:
    """The lines of a file of prompts, `prompt` in each, a text or a chat.

    Raises:
        ValueError: naming the line that is something else.
    """
    found = []
    for where, line in _lines("prompts", path):
        if ("prompt" in line) == ("messages" in line):
            raise ValueError(f"{where}: must have prompt or messages, got {sorted(line)}")
        prompt = line.pop("messages" if "messages" in line else "prompt")
        completion = "" if isinstance(prompt, str) else prompt
        complaint = complaint_of({"prompt": prompt, "completion": completion})
        if complaint:
            raise ValueError(f"{where}: prompt must be a string or a list of messages")
        if {"prompts", "completions"} & set(line):
            raise ValueError(f"{where}: prompts and completions are what the function is given")
        found.append({"prompt": prompt, **line})
    return found


def encode_prompts(
    tokenizer, lines: list[dict], base: BaseModel, config: RewardConfig
) -> list[Prompt]:
    """Prompts as the model takes them; a chat ends where the assistant begins.

    Raises:
        ValueError: for a prompt without a token, one that leaves no room for a completion, or
            tokens that are not the model's.
    """
    names = {name: None for line in lines for name in line if name != "prompt"}
    found = []
    for number, line in enumerate(lines, 1):
        given = line["prompt"]
        if isinstance(given, str):
            ids = list(tokenizer(given).input_ids)
        else:
            if not tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template, which messages need")
            with foreign("the tokenizer's chat template does not take the messages"):
                ids = list(
                    tokenizer.apply_chat_template(
                        given, add_generation_prompt=True, return_dict=False
                    )
                )
        _check_prompt(number, ids, base, config.max_completion_length)
        found.append(Prompt(given, ids, {name: line.get(name) for name in names}))
    return found


def _check_prompt(number: int, ids: list[int], base: BaseModel, completion: int) -> None:
    if not ids:
        raise ValueError(f"prompt {number} must hold a token of the model, it has none")
    if max(ids) >= base.vocabulary:
        raise ValueError(
            f"the tokenizer makes id {max(ids)} of prompt {number}, the model's vocabulary has "
            f"{base.vocabulary}"
        )
    limit = positions(base.model.config)
    if limit and len(ids) + completion > limit:
        raise ValueError(
            f"the model has {limit} positions, prompt {number} has {len(ids)} tokens and "
            f"max_completion_length is {completion}"
        )


class _Ends(StoppingCriteria):
    """Notes the length of every completion: up to the token that ends it."""

    def __init__(self, tokenizer, width: int, *, ids: list[int], stop: str | None):
        self.tokenizer, self.width, self.ids, self.stop = tokenizer, width, ids, stop
        self.lengths: torch.Tensor | None = None  # [rows], 0 where it goes on

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        new = input_ids[:, self.width :]
        if self.lengths is None:
            self.lengths = torch.zeros(len(new), dtype=torch.long, device=new.device)
        goes_on = self.lengths == 0
        ended = torch.isin(new[:, -1], torch.tensor(self.ids, dtype=new.dtype, device=new.device))
        if self.stop:
            # It lies in the last tokens, which have a byte each at least.
            tail = new[:, -len(self.stop.encode()) - 1 :]
            for row in (goes_on & ~ended).nonzero()[:, 0].tolist():
                ended[row] = self.stop in self.tokenizer.decode(tail[row])
        self.lengths[goes_on & ended] = new.shape[1]
        return self.lengths > 0


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """The model without generation settings of its own: a repetition penalty, say, would change
    what is sampled, and the statistics would not know."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class OnPolicy:
    """Completions that the model writes with the head."""

    def __init__(
        self,
        base: BaseModel,
        tokenizer,
        prompts: list[Prompt],
        reward: Callable,
        config: RewardConfig,
    ):
        self.base, self.tokenizer, self.prompts = base, tokenizer, prompts
        self.reward, self.config = reward, config
        end = getattr(base.model.generation_config, "eos_token_id", None)
        end = tokenizer.eos_token_id if end is None else end
        self.end = [] if end is None else [end] if isinstance(end, int) else list(end)

    def rollouts(self, round: int, head: nn.Module, rank: int, world: int) -> list[Rollout]:
        count, seed = self.config.prompts_per_round, self.config.seed
        mine = list(chosen(len(self.prompts), round, count=count, seed=seed))[rank::world]
        at_once = max(1, self.config.generation_batch_size // self.config.num_generations)
        completions = []
        with _plain(self.base.model), attach(self.base.model, head, min_p=head.min_p):
            for i in range(0, len(mine), at_once):
                completions += self._generate(mine[i : i + at_once])
        return self._scored([self.prompts[index] for _, index in mine], completions)

    @torch.no_grad()
    def _generate(self, some: list[tuple[int, int]]) -> list[tuple[list[int], bool]]:
        """(ids, truncated) of the completions of some prompts, prompt by prompt."""
        config, device = self.config, self.base.weight.device
        prompts = [self.prompts[index].ids for _, index in some]
        width = max(map(len, prompts))
        pad = self.end[0] if self.end else 0
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = (
                torch.tensor(prompt),
                1,
            )
        ends = _Ends(self.tokenizer, width, ids=self.end, stop=config.stop)
        output = self.base.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=config.max_completion_length,
            num_return_sequences=config.num_generations,
            pad_token_id=pad,
            eos_token_id=self.end or None,
            stopping_criteria=[ends],
            seed=torch.tensor([mixed(config.seed, "noise", number) for number, _ in some]),
        )
        lengths, rows = ends.lengths.tolist(), output[:, width:].tolist()
        return [(row[:n] if n else row, n == 0) for row, n in zip(rows, lengths)]

    def _scored(
        self, prompts: list[Prompt], completions: list[tuple[list[int], bool]]
    ) -> list[Rollout]:
        """The completions, `num_generations` of each prompt, with their rewards and advantages."""
        if not prompts:
            return []
        size = self.config.num_generations
        of = [prompt for prompt in prompts for _ in range(size)]
        given = [self._shown(prompt, ids) for prompt, (ids, _) in zip(of, completions)]
        columns = {name: [prompt.columns[name] for prompt in of] for name in of[0].columns}
        rewards = rewards_of(
            self.reward, self.config.reward, [prompt.given for prompt in of], given, columns
        )
        gained = [
            advantage
            for i in range(0, len(rewards), size)
            for advantage in advantages(rewards[i : i + size], self.config.scale_rewards)
        ]
        found = []
        for prompt, (ids, truncated), reward, advantage in zip(of, completions, rewards, gained):
            example = Example([*prompt.ids, *ids], [IGNORED] * len(prompt.ids) + ids)
            found.append(Rollout(example, reward, advantage, truncated))
        return found

    def _shown(self, prompt: Prompt, ids: list[int]) -> Completion:
        """A completion as the reward function gets it."""
        ids = ids[:-1] if ids[-1] in self.end else ids
        said = self.tokenizer.decode(ids, skip_special_tokens=True)
        if isinstance(prompt.given, str):
            return said
        return [{"role": "assistant", "content": said}]


class Recorded:
    """Rollouts of a file, whole groups in a round."""

    def __init__(self, groups: list[list[Rollout]], config: RewardConfig):
        self.groups, self.config = groups, config

    def rollouts(self, round: int, head: nn.Module, rank: int, world: int) -> list[Rollout]:
        n, seed = len(self.groups), self.config.seed
        count = min(n, self.config.prompts_per_round)
        mine = list(chosen(n, round, count=count, seed=seed))[rank::world]
        return [rollout for _, index in mine for rollout in self.groups[index]]


def read_rollouts(path: Path) -> list[dict]:
    """The lines of a file of rollouts.

    Raises:
        ValueError: naming the line that is no rollout.
    """
    found = []
    for where, line in _lines("rollouts", path):
        missing = {"prompt", "completion", "reward"} - set(line)
        if missing:
            raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}")
        complaint = complaint_of({name: line[name] for name in ("prompt", "completion")})
        if complaint:
            raise ValueError(f"{where}: {complaint}")
        finite(f"{where}: reward", line["reward"])
        found.append(line)
    return found


def group_rollouts(
    tokenizer, lines: list[dict], base: BaseModel, config: RewardConfig
) -> list[list[Rollout]]:
    """Recorded rollouts by `group`, or by prompt where a line has none; with their advantages.

    A text's completion ends with the end-of-sequence token, unless its line says `truncated`.

    Raises:
        ValueError: if no group has rewards that differ: there is nothing to learn.
    """
    groups: dict[str, list[dict]] = {}
    for line in lines:
        key = json.dumps(line["group"] if "group" in line else line["prompt"], sort_keys=True)
        groups.setdefault(key, []).append(line)
    limit, found = positions(base.model.config), []
    for members in groups.values():
        gained = advantages([float(line["reward"]) for line in members], config.scale_rewards)
        rollouts = []
        for line, advantage in zip(members, gained):
            pair = {name: line[name] for name in ("prompt", "completion")}
            example = encode(tokenizer, pair, example_length(2**31, limit), base.vocabulary)
            if example is None:
                continue
            if line.get("truncated") and example.labels[-1] == tokenizer.eos_token_id:
                example = Example(example.input_ids[:-1], example.labels[:-1])
            truncated = bool(line.get("truncated", False))
            rollouts.append(Rollout(example, float(line["reward"]), advantage, truncated))
        found.append(rollouts)
    if not any(rollout.advantage for rollouts in found for rollout in rollouts):
        raise ValueError(
            "rollouts must have a group whose rewards differ: a group is the lines with the same "
            "group, or the same prompt"
        )
    return found
