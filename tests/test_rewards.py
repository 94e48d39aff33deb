"""Training on rewards, on a tiny model: it learns, entropy is held, resumed runs end in the same
bits, and what users get wrong is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model, rewards
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.rollouts import OnPolicy, Prompt, Recorded, Rollout, advantages, chosen
from tests.commands import assert_refuses, command
from tests.tiny_models import VOCAB, tiny_model
from tests.training_runs import equal, on_two_processes, read_lines

ROOT = Path(__file__).resolve().parent.parent


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids, skip_special_tokens=False) -> str:
        return " ".join(str(int(i)) for i in ids)


def even_share(prompts, completions, **columns):
    """The share of even ids."""
    return [sum(int(w) % 2 == 0 for w in c.split()) / len(c.split()) for c in completions]


def repetition(prompts, completions, **columns):
    """The share of the commonest id: what low temperatures are good at."""
    words = [c.split() for c in completions]
    return [max(map(w.count, w)) / len(w) for w in words]


def config_of(folder: Path, **options) -> RewardConfig:
    options = {"prompts_per_round": 8, "max_completion_length": 12, "rounds": 4, **options}
    source = {} if "rollouts" in options else {"prompts": Path("no"), "reward": "of:test"}
    return RewardConfig(model="", objective="rewards", output=folder, **source, **options)


def some_prompts(n: int = 16) -> list[Prompt]:
    g = torch.Generator().manual_seed(1)
    lengths = [3 + i % 3 for i in range(n)]
    return [Prompt("", torch.randint(3, VOCAB, (k,), generator=g).tolist(), {}) for k in lengths]


def train(folder: Path, reward=even_share, on_round=lambda metrics: None, **options):
    """The head and its metrics."""
    config = config_of(folder, **options)
    base = base_model.wrap(tiny_model("llama"))
    rounds = OnPolicy(base, Numbers(), some_prompts(), reward, config)
    head = rewards.train_on_rewards(
        rounds,
        base,
        config,
        accelerator=Accelerator(),
        on_start=lambda rounds, done: None,
        on_round=on_round,
    )
    return head, read_lines(folder / METRICS_NAME)


def mean(metrics: list[dict], name: str) -> float:
    return sum(m[name] for m in metrics) / len(metrics)


FAST = {"rounds": 30, "learning_rate": 0.01, "lr_scheduler_type": "constant"}


def test_reward_rises_while_entropy_is_held(tmp_path):
    _, metrics = train(tmp_path / "out", **FAST, entropy_weight=0.002, target_entropy=1.6)
    assert abs(metrics[0]["entropy"] - 1.6) < 0.2
    assert mean(metrics[-10:], "reward") > mean(metrics[:3], "reward") + 0.06
    assert abs(mean(metrics[-10:], "entropy") - 1.6) < 0.4


def test_without_a_target_it_collapses_and_with_one_it_does_not(tmp_path):
    """On a reward for repetition, which low temperatures are good at."""
    _, free = train(tmp_path / "free", reward=repetition, **FAST, entropy_weight=0.0)
    held_at = {"entropy_weight": 0.003, "target_entropy": 1.0}
    _, held = train(tmp_path / "held", reward=repetition, **FAST, **held_at)
    assert mean(free[-5:], "entropy") < 0.35
    assert 0.6 < mean(held[-5:], "entropy") < 1.2
    assert mean(held[-5:], "reward") > mean(held[:2], "reward") + 0.03


def test_the_weight_of_entropy():
    config = config_of(Path("out"), entropy_weight=0.01, target_entropy=2.0)
    weights = [rewards.weight_of_entropy(h, config) for h in (0.0, 1.8, 2.0, 2.2, 9.0)]
    assert weights == pytest.approx([0.1, 0.01, 0.0, -0.01, -0.1])
    assert rewards.weight_of_entropy(0.0, config_of(Path("out"), entropy_weight=0.3)) == 0.3


def test_advantages():
    assert advantages([1.0, 0.0, 0.0, 1.0], scale=False) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([3.0, 1.0], scale=True) == [1.0, -1.0]
    assert advantages([2.0, 2.0], scale=True) == [0.0, 0.0]


def test_every_prompt_has_its_turn():
    turns = [list(chosen(10, round, count=4, seed=3)) for round in range(5)]
    numbers = [number for turn in turns for number, _ in turn]
    indices = [index for turn in turns for _, index in turn]
    assert numbers == list(range(20))
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def rollouts_of(config: RewardConfig, prompts: list[Prompt], tokenizer=None) -> list[Rollout]:
    base = base_model.wrap(tiny_model("llama"))
    source = OnPolicy(base, tokenizer or Numbers(), prompts, even_share, config)
    return source.rollouts(0, TemperatureHead(32, min_p=0.1), 0, 1)


def test_a_completion_does_not_depend_on_the_batch(tmp_path):
    at_once, alone = (
        rollouts_of(config_of(tmp_path, generation_batch_size=n), some_prompts()) for n in (256, 8)
    )
    assert at_once == alone
    assert len(at_once) == 64
    assert len({tuple(r.example.input_ids) for r in at_once}) > 60  # a prompt's are not one another


def test_completions_end_where_they_should(tmp_path):
    """At an id that ends them, at a text, or at the limit; what follows is padding, and no
    target."""
    tokenizer = Numbers()
    tokenizer.eos_token_id = 40
    found = rollouts_of(
        config_of(tmp_path, max_completion_length=30, stop="7 5"), some_prompts(), tokenizer
    )
    ways = set()
    for rollout in found:
        labels = [y for y in rollout.example.labels if y != -100]
        text = tokenizer.decode(labels)
        assert rollout.example.input_ids[-len(labels) :] == labels
        ends = labels[-1] == 40, "7 5" in text
        assert 40 not in labels[:-1]
        assert "7 5" not in tokenizer.decode(labels[:-1])
        assert rollout.truncated == (not any(ends))
        assert len(labels) == 30 or any(ends)
        ways.add(ends)
    assert {(False, False), (True, False), (False, True)} <= ways


def test_sampled_tokens_are_in_the_kept_set_of_their_statistics(tmp_path):
    """The second forward sees what the sampler saw: T, cut and tokens agree."""
    config = config_of(tmp_path)
    base = base_model.wrap(tiny_model("llama"))
    run = rewards._Run(None, base, config, Accelerator())
    torch.nn.init.normal_(run.head.mlp[2].weight, std=1.0)
    source = OnPolicy(base, Numbers(), some_prompts(), even_share, config)
    sums = run._sums(source.rollouts(0, run.head, 0, 1))
    assert sums.temperature.std() > 0.1
    assert (sums.stats.rank < sums.stats.kept).all()
    assert int((sums.weight > 0).sum()) == 64 * 12


def test_batches_change_nothing(tmp_path):
    whole, _ = train(tmp_path / "a", batch_tokens=8192)
    split, _ = train(tmp_path / "b", batch_tokens=40)
    for a, b in zip(whole.parameters(), split.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    options = {"target_entropy": 1.5, "rounds": 6, "save_steps": 2}
    whole, lines = train(tmp_path / "a", **options)

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", on_round=stop, **options)
    assert (tmp_path / "b/checkpoint-3").exists()  # what was done is saved
    resumed, resumed_lines = train(tmp_path / "b", resume=True, **options)
    assert equal(whole, resumed)
    assert resumed_lines == lines
    with pytest.raises(ValueError, match="holds a head already"):
        train(tmp_path / "b", **options)


def test_a_failing_reward_loses_nothing(tmp_path):
    calls = []

    def fails(prompts, completions, **columns):
        calls.append(1)
        return even_share(prompts, completions) if len(calls) < 3 else [1.0]

    words = r"for each of 64 completions, got 1; 2 rounds are saved, --resume goes on from them"
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "a", reward=fails)
    resumed, lines = train(tmp_path / "a", resume=True)
    whole, expected = train(tmp_path / "b")
    assert equal(resumed, whole)
    assert lines == expected


def test_rewards_that_never_differ_teach_nothing(tmp_path):
    with pytest.raises(ValueError, match="no round had rewards that differ"):
        train(tmp_path / "out", reward=lambda completions, **_: [0.5] * len(completions))
    assert not (tmp_path / "out/autodeco_config.json").exists()


def test_starts_from_a_head(tmp_path):
    start = TemperatureHead(32, min_p=0.03)
    torch.nn.init.normal_(start.mlp[2].weight, std=0.1)
    start.save_pretrained(tmp_path / "start")
    head, _ = train(tmp_path / "out", head=tmp_path / "start", learning_rate=1e-6, rounds=1)
    assert head.min_p == 0.03
    for a, b in zip(start.parameters(), head.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    TemperatureHead(16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        ValueError, match="head has width 16, the model's output embedding takes 32"
    ):
        train(tmp_path / "no", head=tmp_path / "narrow")


# The command line.

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
    arguments = [sys.executable, "-m", "autodeco_fast", *map(str, on_rewards(model, **options))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=300)
    assert killed.returncode == 9, killed.stderr
    done = subprocess.run([*arguments, "--resume"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = [str(a) for a in on_rewards(model, **{**options, "output": "whole"})]
    whole = subprocess.run([*arguments[:3], *again], env=env, capture_output=True, text=True)
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


def test_groups_of_recorded_rollouts_are_whole():
    rollouts = [[Rollout(None, float(i), 0.0, False)] * 3 for i in range(5)]
    config = config_of(Path("out"), rollouts=Path("r"), prompts_per_round=2)
    found = Recorded(rollouts, config).rollouts(0, None, 0, 1)
    shared = [Recorded(rollouts, config).rollouts(0, None, rank, 2) for rank in range(2)]
    assert len(found) == 6
    assert sorted(r.reward for r in found) == sorted(r.reward for part in shared for r in part)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "scores.py:absent"}, ["scores.py has no function absent"]),
        ({"reward": "scores.py:not_a_function"}, ["scores.py has no function not_a_function"]),
        ({"reward": "nowhere.py:low"}, ["nowhere.py cannot be imported"]),
        ({"reward": "no_such_module:low"}, ["no_such_module cannot be imported"]),
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
        ({"max_completion_length": 1000}, ["the model has 256 positions, prompt 1 has 2 tokens"]),
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
        ('{"text": "w3"}', "line 1: must have prompt or messages, got ['text']"),
        ('{"prompt": "w3", "messages": []}', "line 1: must have prompt or messages"),
        ('{"prompt": 3}', "line 1: prompt must be a string or a list of messages"),
        ('{"prompt": ""}', "prompt 1 must hold a token of the model"),
        ("[1]", "line 1: must be a JSON object, got list"),
        ("{", "line 1: not JSON"),
        ("", "prompts must have at least one line"),
        ('{"messages": [{"role": "user", "content": "w3"}]}', "no chat template"),
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


def test_the_models_own_generation_settings_do_not_count(tmp_path):
    base = base_model.wrap(tiny_model("llama"))
    config = config_of(tmp_path)
    plain = OnPolicy(base, Numbers(), some_prompts(), even_share, config)
    head = TemperatureHead(32, min_p=0.1)
    expected = plain.rollouts(0, head, 0, 1)
    own = base.model.generation_config
    own.update(repetition_penalty=1.5, no_repeat_ngram_size=1, temperature=0.1, top_k=2)
    assert plain.rollouts(0, head, 0, 1) == expected
    assert base.model.generation_config is own


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """Half of a round's prompts each (gloo): the same head up to rounding."""
    code = (
        "from pathlib import Path\n"
        "from tests.test_rewards import train\n"
        f"train(Path({str(tmp_path)!r}) / 'two', rounds=2, target_entropy=1.5)\n"
    )
    done = on_two_processes(tmp_path / "two.py", code)
    assert done.returncode == 0, done.stderr
    one, metrics = train(tmp_path / "one", rounds=2, target_entropy=1.5)
    two = TemperatureHead.from_pretrained(tmp_path / "two")
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    lines = read_lines(tmp_path / "two" / METRICS_NAME)
    assert [m["rollouts"] for m in lines] == [64, 64]
    assert [m["reward"] for m in lines] == pytest.approx([m["reward"] for m in metrics])
