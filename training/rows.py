"""Training rows: JSONL in, token ids and targets out.

A line is an object with exactly the keys of one format:

    {"prompt": …, "completion": …}   text, or lists of chat messages; the completion is learned from
    {"messages": [{"role", "content"}, …]}   the assistant's messages are learned from
    {"text": …}                              everything is learned from
    {"input_ids": […], "labels": […]}        as given; −100 marks ids that are not learned from

Chats go through the tokenizer's chat template; text ends with the end-of-sequence token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

IGNORED = -100
BUILT_IN = ("stdlib:head", "stdlib:held_out")  # the text of the demo, in every Python
FORMATS = ({"prompt", "completion"}, {"messages"}, {"text"}, {"input_ids", "labels"})


class Row(NamedTuple):
    """A tokenised row; `labels[i]` is `input_ids[i]` where that id is a target, else −100."""

    input_ids: list[int]
    labels: list[int]


def _ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def _chat(value: object) -> bool:
    message = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m  # noqa: E731
    return isinstance(value, list) and len(value) > 0 and all(map(message, value))


def _complaint(row: object) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"a row must be a JSON object, got {type(row).__name__}"
    keys = set(row)
    if keys not in FORMATS:
        known = " | ".join("+".join(sorted(f, reverse="prompt" in f)) for f in FORMATS)
        return f"unknown keys {sorted(keys)}: a row must have exactly {known}"
    if "text" in keys and not isinstance(row["text"], str):
        return f"text must be a string, got {type(row['text']).__name__}"
    if "messages" in keys and not _chat(row["messages"]):
        return "messages must be a list of objects with role and content"
    if "prompt" in keys:
        prompt, completion = row["prompt"], row["completion"]
        strings = isinstance(prompt, str) and isinstance(completion, str)
        if not strings and not (_chat(prompt) and _chat(completion)):
            return "prompt and completion must both be strings or both be lists of messages"
    if "labels" in keys:
        if not _ids(row["input_ids"]) or not _ids(row["labels"]):
            return "input_ids and labels must be lists of integers"
        if len(row["input_ids"]) != len(row["labels"]):
            return f"input_ids and labels must be equally long, got {len(row['input_ids'])} and {len(row['labels'])}"
        if any(y not in (i, IGNORED) for i, y in zip(row["input_ids"], row["labels"])):
            return f"labels must repeat input_ids or be {IGNORED}"
    return None


def iter_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file, one at a time, each checked; empty lines are skipped.

    Raises:
        ValueError: naming the file and line, if it is missing, not JSON or not one of the formats.
    """
    if not path.is_file():
        raise ValueError(f"data must be a JSONL file, got {str(path)!r}, which is no file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSON or UTF-8
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            complaint = _complaint(row)
            if complaint:
                raise ValueError(f"{path}, line {number}: {complaint}")
            yield row


def read_rows(path: Path) -> list[dict]:
    """All rows of a JSONL file.

    Raises:
        ValueError: as `iter_rows`, or if there is none.
    """
    rows = list(iter_rows(path))
    if not rows:
        raise ValueError(f"data must have at least one row, {path} has none")
    return rows


def stream_rows(data: str, split: str) -> Iterator[dict]:
    """Rows of a JSONL file, of the Python standard library's text (`stdlib:head`, `stdlib:held_out`), or of a dataset by its
    name, streamed; columns that no format has are left out.

    Raises:
        ValueError: as `iter_rows`; if `data` is neither, `datasets` is not installed, or a row fits no format.
    """
    if Path(data).is_file() or data.endswith((".jsonl", ".json")):
        yield from iter_rows(Path(data))
        return
    if data in BUILT_IN:
        from autodeco_fast.training.stdlib_corpus import read_split

        yield from ({"text": text} for _, text in read_split(data.partition(":")[2]))
        return
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"data must be a JSONL file or a dataset's name, got {data!r}, which is no file; names need `pip install datasets`"
        ) from None
    for number, columns in enumerate(load_dataset(data, split=split, streaming=True), 1):
        known = next((keys for keys in FORMATS if keys <= set(columns)), set(columns))
        row = {key: columns[key] for key in sorted(known)}
        complaint = _complaint(row)
        if complaint:
            raise ValueError(f"{data}, row {number}: {complaint}")
        yield row


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _template(tokenizer, messages: list[dict], prompt: bool = False) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which rows with messages need")
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False))


def _chat_row(tokenizer, messages: list[dict], learned: Iterator[int]) -> Row:
    """The messages numbered `learned` are targets.

    A message's tokens are those between the longest prefixes that the whole chat shares with the chat up to it (with the
    generation prompt) and with the chat that ends with it.
    """
    ids = _template(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for i in learned:
        start = _common_prefix(ids, _template(tokenizer, messages[:i], prompt=True)) if i else 0
        end = _common_prefix(ids, _template(tokenizer, messages[: i + 1]))
        labels[start:end] = ids[start:end]
    return Row(ids, labels)


def _text_row(tokenizer, prompt: str, completion: str) -> Row:
    ids = list(tokenizer(prompt + completion).input_ids)
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    start = _common_prefix(ids, list(tokenizer(prompt).input_ids)) if prompt else 0
    return Row(ids, [IGNORED] * start + ids[start:])


def encode(tokenizer, row: dict, max_length: int) -> Row | None:
    """Tokenises a checked row; None if nothing is left to learn from. The first token is never a target.

    Raises:
        ValueError: for a chat without a chat template.
    """
    if "input_ids" in row:
        ids, labels = row["input_ids"], row["labels"]
    elif "text" in row:
        ids, labels = _text_row(tokenizer, "", row["text"])
    elif "messages" in row:
        learned = (i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        ids, labels = _chat_row(tokenizer, row["messages"], learned)
    elif isinstance(row["prompt"], str):
        ids, labels = _text_row(tokenizer, row["prompt"], row["completion"])
    else:
        messages = [*row["prompt"], *row["completion"]]
        ids, labels = _chat_row(tokenizer, messages, iter(range(len(row["prompt"]), len(messages))))
    ids, labels = list(ids[:max_length]), [IGNORED, *labels[1:max_length]]
    return Row(ids, labels) if any(y != IGNORED for y in labels) else None


def encode_all(tokenizer, rows: list[dict], max_length: int) -> list[Row]:
    """Tokenises checked rows; those without a target are left out.

    Raises:
        ValueError: if none is left.
    """
    encoded = [row for row in (encode(tokenizer, row, max_length) for row in rows) if row is not None]
    if not encoded:
        raise ValueError(f"data must have a target within max_length {max_length}, none of its {len(rows)} rows has")
    return encoded
