"""Prompts to continue: JSONL, each line with `prompt` (text, or a chat), `messages` (a chat) or
`problem` (text, as AutoDeco's evaluation has it: the question of a chat), an optional `task` that
results are grouped by, and fields for a scorer or a reward function. A chat's last answer is left
out, so that training data serves as prompts."""

import json
from dataclasses import dataclass
from pathlib import Path

from autodeco_fast.errors import foreign, parse_json
from autodeco_fast.training.data import is_chat
from autodeco_fast.values import text

BOXED = "Make sure you output the final answer within \\boxed{}."  # AutoDeco's, behind a problem


@dataclass(frozen=True)
class Prompt:
    """A line of the file."""

    line: int  # in the file, from 1
    fields: dict  # all of them

    @property
    def content(self) -> str | list[dict]:
        """Its text, or its chat messages up to a last answer, which is the model's to give."""
        for name in ("prompt", "messages"):
            if name in self.fields:
                return _unanswered(self.fields[name])
        return [{"role": "user", "content": f"{self.fields['problem']}\n{BOXED}"}]

    @property
    def task(self) -> str:
        return self.fields.get("task", "")

    @property
    def shown(self) -> str:
        """As text for the eye."""
        content = self.content
        if isinstance(content, str):
            return content
        return "\n".join(f"{m['role']}: {m['content']}" for m in content)


def _unanswered(content: str | list[dict]) -> str | list[dict]:
    """Text as it is; a chat without the assistant's messages at its end."""
    if isinstance(content, str):
        return content
    last = max((i for i, m in enumerate(content) if m["role"] != "assistant"), default=-1)
    return content[: last + 1]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _complaint(fields: object) -> str | None:
    if not isinstance(fields, dict):
        return f"a prompt must be a JSON object, got {type(fields).__name__}"
    given = [name for name in ("prompt", "messages") if name in fields]
    if len(given) == 2 or not (given or "problem" in fields):
        return "must have either prompt or messages, or else a problem"
    if "prompt" in given and not (is_chat(fields["prompt"]) or _is_text(fields["prompt"])):
        return "prompt must be text or a list of messages"
    if "messages" in given and not is_chat(fields["messages"]):
        return "messages must be a list of objects with role and content"
    if given and not _unanswered(fields[given[0]]):
        return f"{given[0]} must hold a message that is not the assistant's"
    if not given and not _is_text(fields["problem"]):
        return "problem must be text"
    if not isinstance(fields.get("task", ""), str):
        return f"task must be text, got {type(fields['task']).__name__}"
    try:
        text("prompt", json.dumps(fields, ensure_ascii=False))
    except ValueError as error:
        return str(error)
    return None


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file; empty lines are skipped.

    Raises:
        ValueError: naming the line, if one is none; if there is no such file, or none in it.
    """
    if not path.is_file():
        raise ValueError(f"prompts must be a JSONL file, got {str(path)!r}, which is no file")
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            fields = parse_json(line, f"{path}, line {number}")
            complaint = _complaint(fields)
            if complaint:
                raise ValueError(f"{path}, line {number}: {complaint}")
            found.append(Prompt(number, fields))
    if not found:
        raise ValueError(f"prompts must hold at least one, {path} has none")
    return found


def encode_prompt(
    tokenizer, prompt: Prompt, *, vocabulary: int | None, positions: int | None, new_tokens: int
) -> list[int]:
    """Its ids, with the generation prompt of a chat.

    Args:
        vocabulary, positions: of the model; None where they are not known.
        new_tokens: how many must find room behind it.

    Raises:
        ValueError: for a chat that the tokenizer has no template for or whose template does not
            take it, a prompt without a token or with too many, or ids that the model does not have.
    """
    where = f"prompts, line {prompt.line}"
    if isinstance(prompt.content, str):
        ids = list(tokenizer(prompt.content).input_ids)
    elif not tokenizer.chat_template:
        raise ValueError(
            f"{where}: messages and problems need a chat template, which the tokenizer has not"
        )
    else:
        with foreign(f"{where}: the tokenizer's chat template does not take the messages"):
            ids = tokenizer.apply_chat_template(
                prompt.content, add_generation_prompt=True, return_dict=False
            )
            ids = list(ids)
    if not ids:
        raise ValueError(f"{where}: prompt must hold a token of the model")
    if vocabulary is not None and max(ids) >= vocabulary:
        raise ValueError(
            f"{where}: the tokenizer makes id {max(ids)} of it, the model's vocabulary has "
            f"{vocabulary}"
        )
    if positions is not None and len(ids) + new_tokens > positions:
        raise ValueError(
            f"{where}: it has {len(ids)} tokens, with {new_tokens} new ones more than the model's "
            f"{positions} positions"
        )
    return ids
