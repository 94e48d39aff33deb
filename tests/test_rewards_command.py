"""`train --objective rewards` from files to files, and what users get wrong: one line."""

import json
from pathlib import Path

import pytest

from autodeco_fast import TemperatureHead
from autodeco_fast.training.head_folder import METRICS_NAME
from tests.commands import assert_refuses, command
from tests.forked import forked
from tests.training_runs import read_lines

SCORES = """
def low(prompts, completions, target, **columns):
    assert all(isinstance(p, str) for p in prompts) and len(target) == len(prompts)
    words = [[w for w in c.split() if w.startswith("w")] for c in completions]
    return [sum(int(w[1:]) < t for w in ws) / max(1, len(ws)) for ws, t in zip(words, target)]

def fails(**_):
    raise KeyError("no such key")

def short(completions, **_):
    return [0.0]

def nan(completions, **_):
    return [float("nan")] * len(completions)

def words(completions, **_):
    return ["good"] * len(completions)

def dies(prompts, completions, **columns):
    import os, pathlib
    count = pathlib.Path("calls")
    n = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (n + 1))
    if n == 3:
        os._exit(9)  # as SIGKILL: nothing is cleaned up
    return low(prompts, completions, [40] * len(prompts))

not_a_function = 3
"""


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A working directory with a reward function and prompts."""
    monkeypatch.chdir(tmp_path)
    Path("scores.py").write_text(SCORES)
    lines = [{"prompt": f"w{i} w{i + 1}", "target": 30 + i} for i in range(3, 9)]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def on_rewards(folder: Path, **options) -> tuple:
    """Arguments of the command."""
    options = {
        "objective": "rewards",
        "model": folder,
        "prompts": "prompts.jsonl",
        "reward": "scores.py:low",
        "output": "out",
        "rounds": 2,
        "prompts_per_round": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        **options,
    }
    given = {name: value for name, value in options.items() if value is not None}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    return ("train", *(word for pair in pairs for word in pair))


def test_the_command_trains(model, files):
    done = command(*on_rewards(model))
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stderr
    head = TemperatureHead.from_pretrained(files / "out")
    assert head.min_p == 0.1
    lines = read_lines(files / "out" / METRICS_NAME)
    assert [line["rollouts"] for line in lines] == [8, 8]
    assert json.loads((files / "out/training.json").read_text())["reward"] == "scores.py:low"


def test_a_killed_command_resumes_to_the_same_bits(model, files):
    options = {"reward": "scores:dies", "rounds": 6, "save_steps": 2}
    arguments = [str(word) for word in on_rewards(model, **options)]
    code = "import os\nfrom autodeco_fast.cli import run\n"
    killed = forked(f"{code}os.chdir({str(files)!r})\nrun({arguments!r})\n")
    assert killed.returncode == 9, killed.stderr
    done = command(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    whole = command(*on_rewards(model, **{**options, "output": "whole"}))
    assert whole.returncode == 0, whole.stderr
    assert (files / "out/head.safetensors").read_bytes() == (
        files / "whole/head.safetensors"
    ).read_bytes()
    assert read_lines(files / "out" / METRICS_NAME) == read_lines(files / "whole" / METRICS_NAME)


def test_recorded_rollouts(model, files):
    lines = [
        {"prompt": "w3 w4", "completion": f" w{10 + k} w9", "reward": float(k % 2), "extra": k}
        for k in range(8)
    ] + [
        {"prompt": "w5", "completion": " w6 w7", "reward": 1.0, "group": "g", "truncated": True},
        {"prompt": "w8", "completion": " w6", "reward": 0.0, "group": "g"},
    ]
    Path("recorded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command(*on_rewards(model, prompts=None, reward=None, rollouts="recorded.jsonl"))
    assert done.returncode == 0, done.stderr
    first = read_lines(files / "out" / METRICS_NAME)[0]
    assert first["rollouts"] == 10
    assert first["tokens"] == 8 * 3 + 2 + 2  # all but the truncated one end with <s>
    assert first["truncated"] == pytest.approx(0.1)
    assert first["reward"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"reward": "scores.py:absent"},
            ["scores.py has no function absent"],
        ),
        ({"reward": "scores.py:not_a_function"}, ["scores.py has no function not_a_function"]),
        ({"reward": "nowhere.py:low"}, ["nowhere.py cannot be imported: "]),
        (
            {"reward": "no_such_module:low"},
            ["no_such_module cannot be imported: Module"],
        ),
        ({"reward": "low"}, ["must be like module:function or file.py:function, got 'low'"]),
        ({"reward": None}, ["give either prompts and reward, or rollouts"]),
        ({"prompts": "missing.jsonl"}, ["prompts must be a JSONL file"]),
        ({"rollouts": "prompts.jsonl"}, ["give either prompts and reward, or rollouts"]),
        (
            {"prompts": None, "reward": None, "rollouts": "prompts.jsonl"},
            ["prompts.jsonl, line 1: lacks completion, reward"],
        ),
        ({"model": None}, ["model must be given"]),
        ({"gravity": 0.2}, ["objective rewards does not take gravity"]),
        ({"objective": "min_p_hinge", "rounds": 3}, ["only objective rewards takes"]),
        ({"sweep": "rounds=1,2"}, ["sweep is not for objective rewards"]),
        ({"target_entropy": 1.0, "entropy_weight": 0.0}, ["needs an entropy_weight above 0"]),
        (
            {"max_completion_length": 1000},
            ["line 1: it has 2 tokens, with 1000 new ones more than the model's 256"],
        ),
        ({"head": "nothing"}, ["nothing"]),
        ({"rounds": 0}, ["rounds must be at least 1, got 0"]),
    ],
)
def test_bad_input_is_one_line(model, files, options, words):
    assert_refuses(command(*on_rewards(model, **options)), *words)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("fails", "reward 'scores.py:fails' failed: KeyError: 'no such key'"),
        ("short", "must return a number for each of 8 completions, got 1"),
        ("nan", "must return finite numbers, got nan for completion 0"),
        ("words", "must return finite numbers, got 'good' for completion 0"),
    ],
)
def test_a_bad_reward_is_one_line(model, files, function, words):
    done = command(*on_rewards(model, reward=f"scores.py:{function}"))
    assert done.returncode == 2
    *_, last = done.stderr.strip().splitlines()  # after the progress bar
    assert last.startswith("error: ")
    assert words in last
    assert not (files / "out/autodeco_config.json").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "w3"}', "line 1: must have either prompt or messages"),
        ('{"prompt": "w3", "messages": []}', "line 1: must have either prompt or messages"),
        ('{"prompt": 3}', "line 1: prompt must be text or a list of messages"),
        ('{"prompt": ""}', "line 1: prompt must be text or a list of messages"),
        ("[1]", "line 1: a prompt must be a JSON object, got list"),
        ("{", "line 1: not JSON"),
        ("", "prompts must hold at least one"),
        (
            '{"messages": [{"role": "user", "content": "w3"}]}',
            "messages and problems need a chat template",
        ),
        ('{"prompt": "w3", "completions": 1}', "prompts and completions are what the function"),
    ],
)
def test_bad_prompts_are_one_line(model, files, line, words):
    Path("prompts.jsonl").write_text(line + "\n")
    assert_refuses(command(*on_rewards(model)), words)
    assert not (files / "out").exists()


def test_settings_in_a_file(model, files):
    Path("run.yaml").write_text(
        f"objective: rewards\nmodel: {model}\nprompts: prompts.jsonl\nreward: scores.py:low\n"
        "output: out\nrounds: 3\nmax_completion_length: 4\nprompts_per_round: 1\n"
    )
    done = command("train", "--config", "run.yaml", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert len(read_lines(files / "out" / METRICS_NAME)) == 1
