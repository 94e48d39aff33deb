"""Examples: what is learned from, and what is refused with file and line."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training.data import IGNORED, encode, encode_all, read_examples

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
USER, REPLY = (
    {"role": "user", "content": "name a number"},
    {"role": "assistant", "content": "seven"},
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def learned(tokenizer, example, max_length=1000) -> str:
    ids, labels = encode(tokenizer, example, max_length)
    assert len(ids) == len(labels)
    assert all(y in (i, IGNORED) for i, y in zip(ids, labels))
    return tokenizer.decode([y for y in labels if y != IGNORED])


def test_text_is_learned_from_its_second_token_on(tokenizer):
    ids, labels = encode(tokenizer, {"text": "def area(radius):"}, 1000)
    assert labels == [IGNORED, *ids[1:]]
    assert ids[-1] == tokenizer.eos_token_id


def test_only_the_completion_is_learned_from(tokenizer):
    assert learned(tokenizer, {"prompt": "import", "completion": " os\n"}) == " os\n<|endoftext|>"
    assert learned(tokenizer, {"prompt": [USER], "completion": [REPLY]}) == "seven\n"


def test_every_message_of_the_assistant_is_learned_from(tokenizer):
    assert learned(tokenizer, {"messages": [USER, REPLY]}) == "seven\n"
    assert (
        learned(tokenizer, {"messages": [USER, REPLY, USER, {**REPLY, "content": "eight"}]})
        == "seven\neight\n"
    )
    assert encode(tokenizer, {"messages": [USER]}, 1000) is None


def test_a_template_that_drops_earlier_thoughts_teaches_no_other_message(tokenizer):
    """Like templates of reasoning models: what precedes `|` stays in the last message only."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    content = "{{ m.content if loop.last else m.content.split('|')[-1] }}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", content)
    chat = [USER, {**REPLY, "content": "thought|seven"}, USER, {**REPLY, "content": "again|eight"}]
    text = learned(tokenizer, {"messages": chat})
    assert text.endswith("again|eight\n")
    assert "name" not in text
    assert "user" not in text


def test_tokenised_examples_are_taken_as_they_are(tokenizer):
    assert encode(tokenizer, {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]}, 3) == (
        [5, 6, 7],
        [-100, -100, 7],
    )


def test_examples_without_targets_are_left_out(tokenizer):
    example = {"prompt": "import os, sys, re", "completion": " # done"}
    assert encode(tokenizer, example, 3) is None
    assert len(encode_all(tokenizer, [example, {"text": "a b c d"}], 3)) == 1
    with pytest.raises(
        ValueError, match="data must have a target within max_length 3, none of its 1 examples has"
    ):
        encode_all(tokenizer, [example], 3)


def test_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        encode(AutoTokenizer.from_pretrained(EMBEDDED_MODEL), {"messages": [USER, REPLY]}, 10)


def test_reads_every_format(tmp_path):
    examples = [
        {"text": "a"},
        {"messages": [USER]},
        {"prompt": "a", "completion": "b"},
        {"input_ids": [1], "labels": [1]},
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n\n".join(map(json.dumps, examples)))
    assert read_examples(path) == examples


def test_other_columns_are_left_out(tmp_path):
    """Those that no format has, and those of a format that is not all there."""
    path, odd = tmp_path / "examples.jsonl", {"id": 3, "source": "\ud800", "prompt": "c"}
    examples = [{"text": "a"}, {"messages": [USER]}]
    path.write_text("\n".join(json.dumps({**odd, **example}) for example in examples))
    assert read_examples(path) == examples


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "line 2: not JSON"),
        ("\xff", "line 2: not JSON"),
        ("[1]", "line 2: an example must be a JSON object, got list"),
        (
            '{"question": "a", "answer": "b"}',
            r"line 2: unknown keys \['answer', 'question'\].*prompt\+completion",
        ),
        ('{"txt": "a", "id": 3}', r"line 2: unknown keys \['id', 'txt'\].* \| text \| "),
        ('{"prompt": "a", "task": "b"}', "line 2: completion is missing beside prompt$"),
        ('{"prompt": "a", "complete": "b"}', "line 2: completion is missing beside prompt$"),
        ('{"input_ids": [1], "label": [1]}', "line 2: labels is missing beside input_ids$"),
        (
            '{"text": "a", "messages": [], "id": 3}',
            "line 2: an example must have the keys of one format, got those of messages and text$",
        ),
        ('{"text": 3, "id": 3}', "line 2: text must be a string, got int"),
        ('{"text": 3}', "line 2: text must be a string, got int"),
        ('{"messages": []}', "line 2: messages must be"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages must be"),
        (
            '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
            "line 2: prompt and completion must both",
        ),
        (
            '{"input_ids": [1, 2], "labels": [1]}',
            "line 2: input_ids and labels must be equally long, got 2 and 1",
        ),
        (
            '{"input_ids": [1, 2], "labels": [1, 3]}',
            "line 2: labels must repeat input_ids or be -100",
        ),
        (
            '{"input_ids": [1.5], "labels": [1]}',
            "line 2: input_ids and labels must be lists of integers",
        ),
    ],
)
def test_bad_examples_are_named_by_file_and_line(tmp_path, line, words):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1"))
    with pytest.raises(ValueError, match="examples.jsonl, " + words):
        read_examples(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"data must be a JSONL file, got .*which is no file"):
        read_examples(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"'stdlib:head', which is no file; `autodeco-fast scan`"):
        read_examples(Path("stdlib:head"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="data must have at least one example"):
        read_examples(tmp_path / "empty.jsonl")
