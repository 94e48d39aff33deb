"""Recorded rollouts: JSONL of prompt, completion, reward and, where the prompt does not say what
belongs together, group.

A rollout's advantage is its reward less the mean of its group's.
"""

import json
from pathlib import Path

from torch import nn

from autodeco_fast.errors import parse_json
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.data import complaint_of, encode
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.rollouts import Rollout, advantages, chosen
from autodeco_fast.training.scan_store import fingerprint
from autodeco_fast.values import finite, text


class Recorded:
    """Rollouts of a file, whole groups in a round."""

    def __init__(self, groups: list[list[Rollout]], config: RewardConfig):
        self.groups, self.config = groups, config

    def identity(self) -> dict[str, object]:
        ids = [[list(rollout.example) for rollout in group] for group in self.groups]
        return {"rollout_ids": fingerprint(json.dumps(ids).encode())}

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
    if not path.is_file():
        raise ValueError(f"rollouts must be a JSONL file, got {str(path)!r}, which is no file")
    found = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        line = parse_json(raw, where)
        if not isinstance(line, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(line).__name__}")
        text(where, json.dumps(line, ensure_ascii=False))
        missing = {"prompt", "completion", "reward"} - set(line)
        if missing:
            raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}")
        complaint = complaint_of(_as_example(line))
        if complaint:
            raise ValueError(f"{where}: {complaint}")
        finite(f"{where}: reward", line["reward"])
        found.append(line)
    if not found:
        raise ValueError(f"rollouts must have at least one line, {path} has none")
    return found


def _as_example(line: dict) -> dict:
    """What training examples have of it."""
    return {name: line[name] for name in ("prompt", "completion", "truncated") if name in line}


def _group(line: dict) -> str:
    """What a line shares with the others of its group: its group, or else its prompt."""
    name = "prompt" if line.get("group") is None else "group"
    return json.dumps([name, line[name]], sort_keys=True)


def group_rollouts(
    tokenizer, lines: list[dict], base: BaseModel, config: RewardConfig
) -> list[list[Rollout]]:
    """Recorded rollouts by `group`, or by prompt where a line has none or null; with their
    advantages.

    A completion ends with an id that ends a text or a turn, unless its line says `truncated`.

    Raises:
        ValueError: if no group has rewards that differ: there is nothing to learn.
    """
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(_group(line), []).append(line)
    longest, found = base.example_length(2**31), []
    for members in groups.values():
        gained = advantages([float(line["reward"]) for line in members], config.scale_rewards)
        rollouts = []
        for line, advantage in zip(members, gained):
            said, truncated = _as_example(line), line.get("truncated", False)
            example = encode(tokenizer, said, longest, base.vocabulary, ends=base.ends)
            if example is None:
                continue
            rollouts.append(Rollout(example, float(line["reward"]), advantage, truncated))
        found.append(rollouts)
    if not any(rollout.advantage for rollouts in found for rollout in rollouts):
        raise ValueError(
            "rollouts must have a group whose rewards differ: a group is the lines with the same "
            "group, or the same prompt"
        )
    return found
