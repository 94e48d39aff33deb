"""What an evaluation refuses, on one line and before anything is written."""

import json
import shutil

import pytest

from autodeco_fast import TemperatureHead
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.eval_measures import Measured
from autodeco_fast.training.evaluate import check_tasks, tasks_of
from autodeco_fast.training.prompts import Prompt
from tests.commands import assert_refuses, command, listing
from tests.evaluations import (
    run,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("without_figures")


def refused(tmp_path, model, *words, **options):
    with pytest.raises(ValueError) as caught:
        run(tmp_path, model, **options)
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a prompt must be a JSON object, got list"),
        ('{"answer": "x"}', "line 2: must have either prompt or messages"),
        ('{"prompt": "w5", "messages": [], "answer": "x"}', "line 2: must have either"),
        ('{"prompt": "", "answer": "x"}', "line 2: prompt must be text"),
        ('{"messages": ["w5"], "answer": "x"}', "line 2: messages must be a list of objects"),
        ('{"prompt": "w5", "task": 3, "answer": "x"}', "line 2: task must be text, got int"),
        ('{"prompt": "w5 \\ud800", "answer": "x"}', "line 2: prompt must be Unicode"),
        ('{"prompt": "w5"}', "prompts, line 2: answer is missing (scorer exact)"),
        ('{"prompt": "w5", "answer": 3}', "prompts, line 2: answer must be text"),
        ('{"prompt": " ", "answer": "x"}', "line 2: prompt must hold a token of the model"),
        ('{"messages": [{"role": "user", "content": "w5"}], "answer": "x"}',
         "prompts, line 2: messages and problems need a chat template"),
        ('{"prompt": "' + "w5 " * 251 + '", "answer": "x"}',
         "line 2: it has 251 tokens, with 6 new ones more than the model's 256 positions"),
        (b"\xff\xfe", "line 2: not JSON"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_prompt_that_is_none_is_named_by_its_line(model, tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "w5", "answer": "x"}\n' + line + b"\n")
    refused(tmp_path, model, words)


@pytest.mark.parametrize(
    ("tasks", "number", "words"),
    [
        (("a", "all"), 2, "must be another name than 'all', which stands for all prompts"),
        (("other", ""), 1, "must be another name than 'other', which stands for prompts without"),
    ],
)
def test_a_task_that_is_called_like_other_prompts(model, tmp_path, tasks, number, words):
    """Its measures would take the place of theirs."""
    lines = [{"prompt": "w5", "answer": "x", **({"task": task} if task else {})} for task in tasks]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(tmp_path, model, f"prompts, line {number}: task {words}")


def test_a_task_may_be_called_other_where_all_have_one():
    prompts = [Prompt(n, {"prompt": "w5", "task": task}) for n, task in enumerate(("a", "other"))]
    check_tasks(prompts)
    check_tasks([Prompt(1, {"prompt": "w5", "task": "all"})] * 2)
    groups = tasks_of([Measured(prompt, {}) for prompt in prompts])
    assert {name: len(group) for name, group in groups.items()} == {"all": 2, "a": 1, "other": 1}


def test_no_prompts(model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    refused(tmp_path, model, "prompts must hold at least one")
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "prompts.jsonl").mkdir()
    refused(tmp_path, model, "prompts must be a JSONL file")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": ("static T=1 heat=3",)}, ("policy 'static T=1 heat=3'", "heat")),
        ({"policy": ("warm T=1",)}, ("policy 'warm T=1'",)),
        ({"policy": ("static T=-1",)}, ("policy 'static T=-1'",)),
        ({"policy": ("static T=1", "static T=1.0")}, ("'static T=1' twice",)),
        ({"policy": ("greedy", "greedy")}, ("'greedy' twice",)),
        ({"policy": ()}, ("policy must name at least one",)),
        ({"policy": ("head=no/where/here",)}, ("head must be a folder",)),
        ({"scorer": "nothing"}, ("scorer must be one of",)),
        ({"samples": 0}, ("samples must be at least 1, got 0",)),
        ({"stop": ("",)}, ("stop must be texts that are not empty",)),
        ({"stop": "w7"}, ("stop must be a list, each text",)),
        ({"dtype": "int8"}, ("dtype must be one of auto, ",)),
        ({"endpoint": "http://h/v1", "endpoint_model": "m"}, ("give either model or endpoint",)),
        ({"endpoint_model": "m"}, ("endpoint and endpoint_model must be given together",)),
    ],
    ids=range(14),
)  # fmt: skip
def test_options_that_cannot_be_are_one_line(model, tmp_path, options, words):
    refused(tmp_path, model, *words, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not YAML"),
        ("3", "must be a list of policies or a map"),
        ("[]", "must be a list of policies or a map"),
        ("a: [1]", "must be a list of policies or a map of families to such lists"),
        ("- greedy\n- greedy", "'greedy' twice"),
        ("- warm", "policy 'warm'"),
    ],
)
def test_a_file_of_policies_that_is_none(model, tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    refused(tmp_path, model, words, policy=(), policies=tmp_path / "p.yaml")
    refused(tmp_path, model, "policies must be a YAML file", policies=tmp_path / "none.yaml")


def test_a_head_of_another_model_is_refused_before_anything_is_drawn(model, tmp_path):
    TemperatureHead(16).save_pretrained(tmp_path / "narrow")
    policies = ("greedy", f"head={tmp_path / 'narrow'}")
    refused(tmp_path, model, "narrow", "width 16, the model's have 32", policy=policies)
    TemperatureHead(32).save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign/training.json").write_text('{"lm_head": "another"}')
    policies = ("static T=1", f"head={tmp_path / 'foreign'}")
    refused(tmp_path, model, "foreign", "was trained for another model", policy=policies)


def test_the_command_refuses_in_one_line(model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    options = ("eval", "--prompts", prompts, "--scorer", "exact", "--output", tmp_path / "out")
    assert_refuses(command(*options, "--policy", "greedy"), "give either model or endpoint")
    assert_refuses(command(*options, "--model", model), "policy must name at least one")
    assert_refuses(
        command(*options, "--model", "no/where/here", "--policy", "greedy"), "model must be"
    )
    assert_refuses(command("eval"), "Missing option")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.jsonl").write_text("mine\n")
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds samples.jsonl, but no eval.json"):
        run(tmp_path, model)
    assert listing(tmp_path / "out") == before


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of a run, and its prompts beside it."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, model, policy=("greedy",), samples=1)
    return folder


def _without(name):
    return lambda line: {k: v for k, v in line.items() if k != name}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("samples.jsonl", lambda line: [1], "line 6 is no sample"),
        ("samples.jsonl", _without("text"), "line 6 is no sample"),
        ("samples.jsonl", lambda line: {**line, "extra": 1}, "line 6 is no sample"),
        ("samples.jsonl", lambda line: {**line, "text": 3}, "line 6 is no sample"),
        ("samples.jsonl", lambda line: {**line, "temperature": ["x"]}, "line 6 is no sample"),
        ("samples.jsonl", lambda line: {**line, "score": "1"}, "line 6 is no sample"),
        ("samples.jsonl", lambda line: {**line, "prompt": -1}, "line 6 is no sample"),
        ("samples.jsonl", lambda line: {**line, "truncated": 1}, "line 6 is no sample"),
        ("samples.jsonl", lambda line: line, "twice"),
        ("speed.jsonl", lambda line: {"a": 1}, "is no batch"),
        ("speed.jsonl", lambda line: {**line, "tokens": None}, "tokens must be a finite number"),
        ("eval.json", _without("policies"), "is no manifest"),
        ("eval.json", _without("scorer"), "is no manifest"),
        ("eval.json", lambda manifest: [], "must hold a JSON object"),
    ],
    ids=range(14),
)
def test_files_that_were_tampered_with_are_one_line(model, finished, tmp_path, file, change, words):
    """A changed copy of the last line is added; of a manifest, it is changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / file
    lines = [path.read_text()] if file == "eval.json" else path.read_text().splitlines()
    changed = json.dumps(change(json.loads(lines[-1])))
    path.write_text(changed if file == "eval.json" else "\n".join([*lines, changed]) + "\n")
    with pytest.raises(ValueError) as caught:
        run(tmp_path, model, policy=("greedy",), samples=1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataclass_alone_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="give either model or endpoint"):
        EvalConfig(prompts=tmp_path, scorer="exact", output=tmp_path, policy=("greedy",))
