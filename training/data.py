"""Training examples: JSONL in, token ids and targets out.

A line is an object with the keys of exactly one format; others that it has are left out:

    {"prompt": …, "completion": …}   text, or lists of chat messages; the completion is learned from
        and "truncated": true            it was cut off, so that its end is not learned from
    {"messages": [{"role", "content"}, …]}   the assistant's messages are learned from
    {"text": …}                              everything is learned from
    {"input_ids": […], "labels": […]}        as given; −100 marks ids that are not learned from

Chats go through the tokenizer's chat template; text ends with the end-of-sequence token. Of a chat
a target is what the assistant says and the token that ends it, not what the template writes behind.
"""

import itertools
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from autodeco_fast.errors import foreign, parse_json
from autodeco_fast.values import text

IGNORED = -100
BUILT_IN = ("stdlib:head", "stdlib:held_out")  # the text of the demo, in every Python
FORMATS = (
    {"prompt", "completion", "truncated"},
    {"prompt", "completion"},
    {"messages"},
    {"text"},
    {"input_ids", "labels"},
)


class Example(NamedTuple):
    """A tokenised example; `labels[i]` is `input_ids[i]` where that id is a target, else −100."""

    input_ids: list[int]
    labels: list[int]


def _ids(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) for v in value
    )


def is_chat(value: object) -> bool:
    """Whether it is a list of chat messages, of any content."""

    def is_message(m: object) -> bool:
        return isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m

    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def _formats_in(keys: set[str]) -> list[set[str]]:
    """The formats whose keys are all there, without those that lie within another of them."""
    there = [each for each in FORMATS if each <= keys]
    return [each for each in there if not any(each < other for other in there)]


def _written(keys: set[str]) -> str:
    return "+".join(sorted(keys, reverse="prompt" in keys))


def _misfit(keys: set[str], there: list[set[str]]) -> str:
    """What is wrong with keys that are not those of exactly one format."""
    if there:
        several = " and ".join(map(_written, there))
        return f"an example must have the keys of one format, got those of {several}"
    begun = [each for each in FORMATS if each & keys]
    if not begun:
        known = " | ".join(map(_written, FORMATS))
        return f"unknown keys {sorted(keys)}: an example must have {known}"
    nearest = min(begun, key=lambda each: len(each - keys))
    return f"{_written(nearest - keys)} is missing beside {_written(nearest & keys)}"


def _without_others(example: dict) -> dict:
    """A checked example without the keys that its format does not have."""
    (keys,) = _formats_in(set(example))
    return {key: value for key, value in example.items() if key in keys}


def complaint_of(example: object, vocabulary: int | None = None) -> str | None:
    """What is wrong with an example, or None."""
    if not isinstance(example, dict):
        return f"an example must be a JSON object, got {type(example).__name__}"
    there = _formats_in(set(example))
    if len(there) != 1:
        return _misfit(set(example), there)
    keys, example = there[0], _without_others(example)
    if "text" in keys and not isinstance(example["text"], str):
        return f"text must be a string, got {type(example['text']).__name__}"
    if "messages" in keys and not is_chat(example["messages"]):
        return "messages must be a list of objects with role and content"
    if "prompt" in keys:
        prompt, completion = example["prompt"], example["completion"]
        strings = isinstance(prompt, str) and isinstance(completion, str)
        if not strings and not (is_chat(prompt) and is_chat(completion)):
            return "prompt and completion must both be strings or both be lists of messages"
        if not isinstance(example.get("truncated", False), bool):
            return f"truncated must be true or false, got {example['truncated']!r}"
    if "labels" in keys:
        if not _ids(example["input_ids"]) or not _ids(example["labels"]):
            return "input_ids and labels must be lists of integers"
        if len(example["input_ids"]) != len(example["labels"]):
            lengths = f"{len(example['input_ids'])} and {len(example['labels'])}"
            return f"input_ids and labels must be equally long, got {lengths}"
        if any(y not in (i, IGNORED) for i, y in zip(example["input_ids"], example["labels"])):
            return f"labels must repeat input_ids or be {IGNORED}"
        if vocabulary is not None and any(not 0 <= i < vocabulary for i in example["input_ids"]):
            return f"input_ids must be in [0, {vocabulary}), the model's vocabulary"
        return None
    try:
        text("text", json.dumps(example, ensure_ascii=False))
    except ValueError as error:
        return str(error)
    return None


def iter_examples(path: Path, vocabulary: int | None = None) -> Iterator[dict]:
    """The examples of a JSONL file, one at a time, each checked; empty lines are skipped.

    Args:
        vocabulary: of the model, which `input_ids` must lie in; not looked at if None.

    Raises:
        ValueError: naming the file and line, if it is missing, not JSON or not one of the formats.
    """
    if not path.is_file():
        advice = "; `autodeco-fast scan` takes that" if str(path) in BUILT_IN else ""
        raise ValueError(f"data must be a JSONL file, got {str(path)!r}, which is no file{advice}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            example = parse_json(line, f"{path}, line {number}")
            complaint = complaint_of(example, vocabulary)
            if complaint:
                raise ValueError(f"{path}, line {number}: {complaint}")
            yield _without_others(example)


def read_examples(path: Path, vocabulary: int | None = None) -> list[dict]:
    """All examples of a JSONL file.

    Raises:
        ValueError: as `iter_examples`, or if there is none.
    """
    examples = list(iter_examples(path, vocabulary))
    if not examples:
        raise ValueError(f"data must have at least one example, {path} has none")
    return examples


def is_local(data: str) -> bool:
    """Whether `data` names a JSONL file, there or not, and no dataset."""
    return Path(data).is_file() or data.endswith((".jsonl", ".json"))


def stream_examples(data: str, split: str, vocabulary: int | None = None) -> Iterator[dict]:
    """Rows of a JSONL file, of the Python standard library's text (`stdlib:head`,
    `stdlib:held_out`), or of a dataset by its name, streamed; keys that its format does not have
    are left out.

    Raises:
        ValueError: as `iter_examples`; if `data` is neither, `datasets` is not installed, or an
            example fits no format.
    """
    if is_local(data):
        yield from iter_examples(Path(data), vocabulary)
        return
    if data in BUILT_IN:
        from autodeco_fast.training.stdlib_corpus import read_split

        yield from ({"text": text} for _, text in read_split(data.partition(":")[2]))
        return
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"data must be a JSONL file or a dataset's name, got {data!r}, which is no file; names "
            "need `pip install datasets`"
        ) from None
    unreadable = (
        f"data must be a JSONL file or a dataset's name, got {data!r}, of which split {split!r} "
        "cannot be read"
    )
    with foreign(unreadable):
        dataset = iter(load_dataset(data, split=split, streaming=True))
    for number in itertools.count(1):
        with foreign(unreadable):
            columns = next(dataset, None)
        if columns is None:
            return
        complaint = complaint_of(columns, vocabulary)
        if complaint:
            raise ValueError(f"{data}, example {number}: {complaint}")
        yield _without_others(columns)


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _template(tokenizer, messages: list[dict], prompt: bool = False) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which examples with messages need")
    with foreign("the tokenizer's chat template does not take the messages"):
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        )


def _said(tokenizer, messages: list[dict], i: int, ids: list[int]) -> tuple[int, int]:
    """Where the content of message i begins and ends in the chat's ids: what changes if it is
    replaced. Behind the last id, if the template leaves the message out."""
    content = messages[i]["content"]
    absent = next(c for c in map(chr, range(ord("a"), sys.maxunicode)) if c not in str(content))
    other = [{"type": "text", "text": absent}] if isinstance(content, list) else absent
    changed = [*messages[:i], {**messages[i], "content": other}, *messages[i + 1 :]]
    with_other = _template(tokenizer, changed)
    start = _common_prefix(ids, with_other)
    return start, max(start, len(ids) - _common_prefix(ids[::-1], with_other[::-1]))


def _turn(
    tokenizer, messages: list[dict], i: int, ids: list[int], ends: set[int]
) -> tuple[int, int]:
    """Where message i is in the chat's ids, up to the id that ends it.

    Its tokens are those between the longest prefixes that the whole chat shares with the chat up to
    it (with the generation prompt) and with the chat that ends with it. Templates of reasoning
    models write a message otherwise where it is the last: there it is its content, and what follows
    that in the chat that ends with it, too.
    """
    until = ids if i + 1 == len(messages) else _template(tokenizer, messages[: i + 1])
    end = _common_prefix(ids, until)
    start = _turn_start(tokenizer, messages[:i], ids)
    if start is None or not ends.issuperset(until[end:]):
        start, said = _said(tokenizer, messages, i, ids)
        _, behind = _said(tokenizer, messages[: i + 1], i, until)
        end = said + _common_prefix(ids[said:], until[behind:])
    else:
        said = start
    return start, next((at + 1 for at in range(said, end) if ids[at] in ends), end)


def _turn_start(tokenizer, before: list[dict], ids: list[int]) -> int | None:
    """Where the turn behind some messages begins, if the whole chat has them as they are there."""
    if not before:
        return None
    asked = _template(tokenizer, before, prompt=True)
    start = _common_prefix(ids, asked)
    return start if start >= _common_prefix(asked, _template(tokenizer, before)) else None


def _chat_example(
    tokenizer,
    messages: list[dict],
    learned: Iterable[int],
    *,
    ends: Collection[int],
    truncated: bool = False,
) -> Example:
    """The messages numbered `learned` are targets; of the last one nothing behind its content if it
    is truncated."""
    ids, ends = _template(tokenizer, messages), {*ends, tokenizer.eos_token_id}
    labels = [IGNORED] * len(ids)
    for i in learned:
        start, end = _turn(tokenizer, messages, i, ids, ends)
        labels[start:end] = ids[start:end]
    if truncated:
        _, end = _said(tokenizer, messages, len(messages) - 1, ids)
        ids, labels = ids[:end], labels[:end]
    return Example(ids, labels)


def _text_example(tokenizer, prompt: str, completion: str, *, truncated: bool = False) -> Example:
    ids = list(tokenizer(prompt + completion).input_ids)
    end = tokenizer.eos_token_id
    if end is not None and truncated and ids[-1:] == [end]:
        ids.pop()
    elif end is not None and not truncated and ids[-1:] != [end]:
        ids.append(end)
    start = _common_prefix(ids, list(tokenizer(prompt).input_ids)) if prompt else 0
    return Example(ids, [IGNORED] * start + ids[start:])


def _encoded(tokenizer, example: dict, ends: Collection[int]) -> Example:
    """All ids and labels of a checked example."""
    if "input_ids" in example:
        return Example(example["input_ids"], example["labels"])
    if "text" in example:
        return _text_example(tokenizer, "", example["text"])
    if "messages" in example:
        learned = [i for i, m in enumerate(example["messages"]) if m["role"] == "assistant"]
        return _chat_example(tokenizer, example["messages"], learned, ends=ends)
    prompt, completion = example["prompt"], example["completion"]
    truncated = example.get("truncated", False)
    if isinstance(prompt, str):
        return _text_example(tokenizer, prompt, completion, truncated=truncated)
    messages = [*prompt, *completion]
    learned = range(len(prompt), len(messages))
    return _chat_example(tokenizer, messages, learned, ends=ends, truncated=truncated)


def encode(
    tokenizer,
    example: dict,
    max_length: int,
    vocabulary: int | None = None,
    *,
    ends: Collection[int] = (),
) -> Example | None:
    """Tokenises a checked example; None if nothing is left to learn from.

    The first token is never a target.

    Args:
        vocabulary: of the model; not looked at if None.
        ends: ids that end a text of the model; the tokenizer's end-of-sequence token is one.

    Raises:
        ValueError: for a chat without a chat template, one that the template does not take, or a
            tokenizer whose ids are not the model's.
    """
    ids, labels = _encoded(tokenizer, example, ends)
    ids, labels = list(ids[:max_length]), [IGNORED, *labels[1:max_length]]
    if vocabulary is not None and ids and max(ids) >= vocabulary:
        raise ValueError(
            f"the tokenizer makes id {max(ids)} of an example, the model's vocabulary has "
            f"{vocabulary}"
        )
    return Example(ids, labels) if any(y != IGNORED for y in labels) else None


def nothing_to_learn(examples: int, max_length: int) -> str:
    """What is wrong with data of which no example has a target."""
    return (
        f"data must have a target within max_length {max_length}, none of its {examples} examples "
        "has"
    )


def encode_all(
    tokenizer,
    examples: list[dict],
    max_length: int,
    vocabulary: int | None = None,
    *,
    ends: Collection[int] = (),
) -> list[Example]:
    """Tokenises checked examples; those without a target are left out.

    Raises:
        ValueError: as `encode`, or if none is left.
    """
    encoded = [
        encode(tokenizer, example, max_length, vocabulary=vocabulary, ends=ends)
        for example in examples
    ]
    encoded = [example for example in encoded if example is not None]
    if not encoded:
        raise ValueError(nothing_to_learn(len(examples), max_length))
    return encoded
