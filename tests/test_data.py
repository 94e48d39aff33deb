"""Examples: what is learned from, and what is refused with file and line."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training.base_model import facts
from autodeco_fast.training.data import IGNORED, encode, encode_all, read_examples
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.scan_store import Scan
from tests.checkpoint_folders import chat_model
from tests.commands import command
from tests.training_runs import read_lines

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


CHATML = """
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" and MARKED %}<think>

</think>

{% endif %}{{ m.content or "" }}{{ m.calls }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLAIN = CHATML.replace("MARKED", "false")
THINKS = CHATML.replace("MARKED", "loop.last")  # like Qwen3's: no thought in earlier answers
SYSTEM_LAST = """
{%- for m in messages %}{% if m.role == "user" %}[INST]{% if loop.index0 >= messages|length - 2 %}
be brief
{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"""
EIGHT = {**REPLY, "content": "x <b>eight</b>.\n"}


def chat_tokenizer(template: str):
    """The embedded model's tokenizer with ChatML's marks; a turn's end is not the text's end."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def chat_targets(template: str, example: dict, **options) -> list[str]:
    """The runs of targets of a chat, as text."""
    tokenizer = chat_tokenizer(template)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    _, labels = encode(tokenizer, example, 1000, ends=ends, **options)
    runs = itertools.groupby(labels, lambda y: y != IGNORED)
    return [tokenizer.decode(list(run)) for is_target, run in runs if is_target]


def test_nothing_behind_the_end_of_a_turn_is_learned_from():
    """A model that has written `<|im_end|>` stops: the line break is the template's."""
    chat = [USER, REPLY, USER, EIGHT]
    want = ["seven<|im_end|>", "x <b>eight</b>.\n<|im_end|>"]
    assert chat_targets(PLAIN, {"messages": chat}) == want
    assert chat_targets(PLAIN, {"prompt": chat[:1], "completion": chat[1:2]}) == want[:1]
    tokenizer = chat_tokenizer(PLAIN)
    tokenizer.eos_token = "<|im_end|>"  # which is known without the model
    labels = encode(tokenizer, {"messages": chat}, 1000).labels
    assert tokenizer.decode([y for y in labels if y != IGNORED]) == "".join(want)


def test_earlier_answers_are_learned_from_where_the_last_one_is_written_otherwise():
    chat = [USER, EIGHT, USER, REPLY, USER, REPLY]
    want = ["x <b>eight</b>.\n<|im_end|>", "seven<|im_end|>"]
    found = chat_targets(THINKS, {"messages": chat})
    assert found == [*want, "<think>\n\n</think>\n\nseven<|im_end|>"]
    assert chat_targets(SYSTEM_LAST, {"messages": chat}) == [*want, want[1]]
    drops = PLAIN.replace("m.content or", "(m.content or '').split('|')[0 if loop.last else -1] or")
    thought = [USER, {**REPLY, "content": "a|eight"}, USER, REPLY]
    assert chat_targets(drops, {"messages": thought}) == ["eight<|im_end|>", want[1]]
    end = "{{ '<|im_end|>' if loop.last or m.role == 'user' else '<|end|>' }}"
    otherwise = THINKS.replace("<|im_end|>", end)
    found = chat_targets(otherwise, {"messages": chat})
    assert found == ["x <b>eight</b>.\n", "seven", "<think>\n\n</think>\n\nseven<|im_end|>"]


def test_the_commands_know_the_ends_of_the_model(model, tmp_path):
    """Here w9, which is no end to the tokenizer: a chat's targets are two words and it."""
    turn, answer = "w3 {{ m.content }} w9 w4 ", "w3 "
    folder, _ = chat_model(model, tmp_path / "model", turn=turn, answer=answer)
    GenerationConfig(eos_token_id=[8, 9]).save_pretrained(folder)
    assert facts(str(folder)).ends == [8, 9]
    ask, said = ({"role": r, "content": c} for r, c in (("user", "w5"), ("assistant", "w6 w7")))
    data, scanned, head = (tmp_path / name for name in ("rows.jsonl", "scan", "head"))
    data.write_text(json.dumps({"messages": [ask, said, ask, said]}) + "\n")
    options = ("--model", folder, "--data", data, "--output")
    done = command("scan", *options, scanned, "--all-tokens")
    assert done.returncode == 0, done.stderr
    assert Scan(scanned).load().target.tolist() == [6, 7, 9] * 2
    done = command("train", *options, head, "--objective", "label_free")
    assert done.returncode == 0, done.stderr
    assert read_lines(head / METRICS_NAME)[0]["target_tokens"] == 6


def test_calls_of_tools_are_learned_from():
    call = {"role": "assistant", "content": None, "calls": "<call>area()</call>"}
    tool = {"role": "tool", "content": "4"}
    for template, before in ((PLAIN, ""), (THINKS, "<think>\n\n</think>\n\n")):
        found = chat_targets(template, {"messages": [USER, call, tool, REPLY]})
        assert found == ["<call>area()</call><|im_end|>", f"{before}seven<|im_end|>"]


def test_an_answer_begins_behind_messages_that_a_later_one_changes():
    """Like gpt-oss: a call's thoughts are left out once there is an answer to it."""
    call = {"role": "assistant", "content": "area()", "thought": "hm"}
    thought = "{% if m.thought and messages[-1].role != 'assistant' %}{{ m.thought }} {% endif %}"
    template = PLAIN.replace("{{ m.content", thought + "{{ m.content")
    chat = [USER, call, {"role": "tool", "content": "4"}, REPLY]
    found = chat_targets(template, {"messages": chat})
    assert found == ["area()<|im_end|>", "seven<|im_end|>"]


def test_what_a_template_leaves_out_is_not_learned_from():
    last = PLAIN.replace("for m in messages", "for m in messages[-2:]")
    assert chat_targets(last, {"messages": [USER, EIGHT, USER, REPLY]}) == ["seven<|im_end|>"]


def test_a_chat_that_the_assistant_begins():
    """What the template writes before it is no target."""
    system = "<|im_start|>system\nbe brief<|im_end|>\n" + PLAIN
    chat = [EIGHT, USER, REPLY]
    want = ["x <b>eight</b>.\n<|im_end|>", "seven<|im_end|>"]
    assert chat_targets(system, {"messages": chat}) == want


@pytest.mark.parametrize("template", [PLAIN, THINKS, TEMPLATE])
def test_the_end_of_what_was_cut_off_is_not_learned_from(template):
    chat = {"prompt": [USER, REPLY, USER], "completion": [REPLY], "truncated": True}
    *_, last = chat_targets(template, chat)
    assert last.removeprefix("<think>\n\n</think>\n\n") == "seven"
    *_, last = chat_targets(template, {**chat, "truncated": False})
    assert last.endswith("seven\n" if template == TEMPLATE else "seven<|im_end|>")


def test_the_end_of_text_that_was_cut_off_is_not_learned_from(tokenizer):
    example = {"prompt": "import", "completion": " os\n", "truncated": True}
    assert learned(tokenizer, example) == " os\n"


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
        {"prompt": "a", "completion": "b", "truncated": True},
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
            '{"prompt": "a", "completion": "b", "truncated": 1}',
            "line 2: truncated must be true or false, got 1",
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
