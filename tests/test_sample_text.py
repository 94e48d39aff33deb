"""`autodeco-fast sample-text`: what it draws, that it goes on where it was, what it refuses."""

import json
import os
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import base_model, sample_text
from autodeco_fast.training.data import read_examples
from tests.commands import Done, assert_refuses, command, listing
from tests.forked import forked


def draw(model, output: Path, *options: object, prompts: list[dict] | None = None) -> Done:
    if prompts is not None:
        path = output.parent / "prompts.jsonl"
        path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        options = ("--prompts", path, *options)
    options = ("--number", 10, "--max-new-tokens", 6, *options)
    return command("sample-text", "--model", model, "--output", output, *options)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_continuations_are_examples(model, tmp_path):
    prompts = [{"prompt": "w5 w6 w7", "answer": 3}, {"prompt": "w8"}]
    done = draw(model, tmp_path / "a.jsonl", prompts=prompts)
    assert done.returncode == 0, done.stderr
    assert "10 continuations" in done.stderr
    examples = read_examples(tmp_path / "a.jsonl", vocabulary=96)
    assert len(examples) == 10
    for number, example in enumerate(examples):
        prompt = [5, 6, 7] if number % 2 == 0 else [8]
        ids, labels = example["input_ids"], example["labels"]
        assert ids[: len(prompt)] == prompt
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
        new = ids[len(prompt) :]
        assert len(new) == 6 or new[-1] == 1
        assert 1 not in new[:-1]  # nothing follows an end
    assert not (tmp_path / "a.jsonl.part").exists()
    assert len({tuple(e["input_ids"]) for e in examples}) > 5


def test_the_seed_and_the_number_decide_and_not_the_batch(model, tmp_path):
    prompts = [{"prompt": "w5 w6 w7"}, {"prompt": "w8"}, {"prompt": "w9 w10"}]
    found = {}
    for name, options in (
        ("a", ("--batch-size", 16)),
        ("b", ("--batch-size", 3)),
        ("c", ("--seed", 1)),
    ):
        path = tmp_path / f"{name}.jsonl"
        assert draw(model, path, *options, prompts=prompts).returncode == 0
        found[name] = lines(path)
    assert found["a"] == found["b"] != found["c"]


@pytest.mark.parametrize("options", [("--temperature", 0), ("--min-p", 1)])
def test_without_chance_it_is_greedy(model, tmp_path, options):
    path = tmp_path / "a.jsonl"
    assert draw(model, path, *options, prompts=[{"prompt": "w5 w6 w7"}]).returncode == 0
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    want = base.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0].tolist()
    assert all(line["input_ids"] == want for line in lines(path))


def test_the_models_own_generation_settings_do_not_count(model, tmp_path):
    shutil.copytree(model, tmp_path / "own")
    path = tmp_path / "own/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 9.0}))
    for folder, name in ((model, "a"), (tmp_path / "own", "b")):
        assert draw(folder, tmp_path / name, prompts=[{"prompt": "w5 w6"}]).returncode == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_without_prompts_it_begins_at_the_beginning(tmp_path):
    path = tmp_path / "a.jsonl"
    assert draw(EMBEDDED_MODEL, path, "--number", 3).returncode == 0
    assert all(line["input_ids"][0] == 0 and line["labels"][0] == -100 for line in lines(path))


def test_chats_are_continued_with_an_answer(tmp_path, monkeypatch):
    from autodeco_fast.training import base_model

    tokenizer = base_model.load_tokenizer(str(EMBEDDED_MODEL))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(base_model, "load_tokenizer", lambda name: tokenizer)
    ask, answer = {"role": "user", "content": "def"}, {"role": "assistant", "content": "area"}
    prompts = [{"messages": [ask, answer]}, {"messages": [ask]}, {"messages": [ask, answer, ask]}]
    path = tmp_path / "a.jsonl"
    done = draw(EMBEDDED_MODEL, path, "--number", 3, prompts=prompts)
    assert done.returncode == 0, done.stderr
    given = [
        tokenizer.decode([i for i, y in zip(line["input_ids"], line["labels"]) if y == -100])
        for line in lines(path)
    ]
    want = "[user]def[assistant]"
    assert given == [want, want, "[user]def[assistant]area[user]def[assistant]"]


KILLED = """
    import os, signal
    from pathlib import Path
    from autodeco_fast.training import sample_text
    from autodeco_fast.cli import run

    plain, calls = sample_text.append_text, []

    def append_text(path, text):
        calls.append(text)
        if len(calls) == {kill_at}:
            plain(path, text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        plain(path, text)

    sample_text.append_text = append_text
    run({arguments!r})
"""


def test_killed_in_the_middle_of_a_line_it_goes_on(model, tmp_path):
    options = ("--batch-size", 3, "--number", 10, "--max-new-tokens", 6)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert draw(model, whole, *options).returncode == 0
    for kill_at in (1, 3, 2):  # of what a run appends: the header first, if there is none
        arguments = ["sample-text", "--model", model, "--output", killed, *options]
        code = textwrap.dedent(KILLED).format(
            kill_at=kill_at, arguments=[str(a) for a in arguments]
        )
        done = forked(code)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not killed.exists()
    other = draw(model, killed, *options, "--seed", 3)
    assert_refuses(other, "was begun with other settings or prompts: delete it")
    assert draw(model, killed, *options).returncode == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert_refuses(draw(model, killed, *options), "is there already; name another file")


@pytest.mark.parametrize("change", ["weights", "ends"])
def test_a_model_that_was_changed_is_refused(model, tmp_path, monkeypatch, change):
    folder, path = tmp_path / "model", tmp_path / "a.jsonl"
    shutil.copytree(model, folder)
    with monkeypatch.context() as failing:
        failing.setattr(sample_text, "_finish", lambda part, output: sys.exit(3))
        with pytest.raises(SystemExit):
            draw(folder, path)
    begun = (tmp_path / "a.jsonl.part").read_bytes()
    if change == "weights":
        other = AutoModelForCausalLM.from_pretrained(model)
        other.model.layers[0].mlp.up_proj.weight.data += 0.01
        other.save_pretrained(folder)
    else:
        GenerationConfig(eos_token_id=[1, 40]).save_pretrained(folder)
    assert_refuses(draw(folder, path), "was begun with other weights, dtype or ends of the model")
    assert (tmp_path / "a.jsonl.part").read_bytes() == begun


def test_a_part_of_something_else_is_left_alone(model, tmp_path):
    part = tmp_path / "a.jsonl.part"
    for text, words in (
        ("x\n", "a.jsonl.part, line 1: not JSON"),
        ("[1]\n", "was begun with other"),
    ):
        part.write_text(text)
        assert_refuses(draw(model, tmp_path / "a.jsonl"), words)
        assert part.read_text() == text


def test_one_run_at_a_time(model, tmp_path):
    import fcntl

    with (tmp_path / "a.jsonl.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = draw(model, tmp_path / "a.jsonl")
    assert_refuses(done, "is being written by another run")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a prompt must be a JSON object, got list"),
        ('{"text": "w5"}', "line 2: must have either prompt or messages"),
        ('{"prompt": ""}', "line 2: prompt must be text"),
        ('{"messages": []}', "line 2: messages must be a list of objects"),
        ('{"prompt": "\\ud800"}', "line 2: prompt must be Unicode, got a lone surrogate"),
        (json.dumps({"prompt": "w5 " * 300}), "line 2: it has 300 tokens, with"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}), "need a chat template"),
    ],
)
def test_prompts_that_are_none_are_refused(model, tmp_path, prompt, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w5"}\n' + prompt + "\n")
    done = draw(model, tmp_path / "a.jsonl", "--prompts", path)
    assert_refuses(done, words)
    assert set(listing(tmp_path)) == {"prompts.jsonl"}


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(base_model, "load_causal_lm", None)  # calling it would be a traceback
    (tmp_path / "file").touch()
    for name in ("file/a.jsonl", "file/b/a.jsonl", "n" * 255):
        output = tmp_path / name
        assert_refuses(draw(model, output), f"output {str(output)!r} cannot be written: [Errno")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--number", 0), "number must be at least 1, got 0"),
        (("--max-new-tokens", 10**6), "max_new_tokens must be below the model's"),
        (("--temperature", -1), "temperature must be ≥ 0, got -1.0"),
        (("--temperature", 1e30), "temperature must be at most 1e+29, got 1e+30"),
        (("--min-p", 1.5), "min_p must be in [0, 1], got 1.5"),
        (("--prompts", "nowhere"), "prompts must be a JSONL file, got 'nowhere'"),
        (("--model", "no/where/here"), "model must be a folder or a hub id"),
    ],
)
def test_options_are_checked(model, tmp_path, options, words):
    assert_refuses(draw(model, tmp_path / "a.jsonl", *options), words)
    assert not os.listdir(tmp_path)
