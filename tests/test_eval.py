"""A run of `autodeco-fast eval`: the same samples in any batch and after any death, what comes out,
what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodeco_fast import TemperatureHead, attach
from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.policies import Policy, parse
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.eval_requests import seed_of
from autodeco_fast.training.evaluate import evaluate
from tests.commands import ROOT, assert_refuses, command, listing
from tests.evaluations import (
    POLICIES,
    QUIET,
    config,
    lines_of,
    run,
    samples_of,
    write_prompts,
)


@pytest.fixture
def spread_head(tmp_path):
    """The folder of a head whose temperatures differ."""
    torch.manual_seed(0)
    head = TemperatureHead(32)
    torch.nn.init.normal_(head.mlp[2].weight, std=1.5)
    head.save_pretrained(tmp_path / "spread")
    return tmp_path / "spread"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes longer than the runs; test_eval_page.py looks at them."""
    monkeypatch.setattr("autodeco_fast.training.eval_page.draw", lambda points, label: b"<svg/>")


# Samples


def by_hand(model, policy: str, *, ids: list[int], seed: int, new: int) -> torch.Tensor:
    """The ids that `generate` makes of one prompt alone."""
    with attach(model, parse(policy)):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=new, seed=torch.tensor([seed]), pad_token_id=0
        )
    return out[0, len(ids) :]


def test_samples_are_those_of_generate_one_at_a_time(model, spread_head, tmp_path):
    """Whatever is batched, shared, padded and thinned; each ends where it should."""
    policies = (
        *POLICIES,
        f"head={spread_head} min_p=0.02",
        "entropy a=0.6",
        "adaptive_p target=0.4",
    )
    run(tmp_path, model, policy=policies, batch_size=8)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()]
    found = samples_of(tmp_path / "out")
    assert len(found) == len(policies) * len(prompts) * 3
    ended = 0
    for (policy, prompt, number), sample in found.items():
        assert sample["seed"] == seed_of(0, prompt, number)
        ids = tokenizer(prompts[prompt]["prompt"]).input_ids
        expected = by_hand(base, policy, ids=ids, seed=sample["seed"], new=6).tolist()
        n = sample["length"]
        assert sample["tokens"] == expected[:n]
        assert n == len(sample["tokens"]) == len(sample["temperature"]) == len(sample["kept"])
        text = tokenizer.decode(expected[:n], skip_special_tokens=True)
        stops = 1 in expected[:n] or "w7" in text or "w11 " in text
        assert sample["truncated"] is (not stops)
        assert n == 6 or stops
        assert "w7" not in sample["text"]
        assert "w11 " not in sample["text"]
        assert text.startswith(sample["text"])
        ended += stops
    assert 5 < ended < len(found) - 5


def test_a_sample_is_the_same_in_any_batch(model, spread_head, tmp_path):
    policies = (*POLICIES, f"head={spread_head} min_p=0.02")
    drawn = []
    for size in (1, 8, 64):
        run(tmp_path, model, f"out{size}", policy=policies, batch_size=size)
        drawn.append(samples_of(tmp_path / f"out{size}"))
    for other in drawn[1:]:
        assert other.keys() == drawn[0].keys()
        for key, sample in drawn[0].items():
            temperatures = other[key].pop("temperature")
            assert temperatures == pytest.approx(sample["temperature"], abs=2e-4)
            assert other[key] == {k: v for k, v in sample.items() if k != "temperature"}


def test_the_record_holds_each_tokens_temperature_and_kept_set(model, spread_head, tmp_path):
    head = f"head={spread_head} min_p=0.02"
    run(tmp_path, model, policy=("static T=0.7 min_p=0.3", "greedy", head), stop=())
    found = samples_of(tmp_path / "out")
    spread = [T for (policy, *_), s in found.items() for T in s["temperature"] if policy == head]
    assert max(spread) - min(spread) > 0.3
    for (policy, *_), sample in found.items():
        if policy != head:
            assert set(sample["temperature"]) == {0.0 if policy == "greedy" else 0.7}
        assert all(1 <= kept <= 96 for kept in sample["kept"])
        if policy == "greedy":
            assert set(sample["kept"]) == {1}
    assert max(k for s in found.values() for k in s["kept"]) > 1


def test_all_policies_are_under_the_same_noise(model, tmp_path):
    run(tmp_path, model, policy=("static T=1 min_p=0.05", "static T=1 min_p=0.0500001"))
    first, second = ({k[1:]: s["tokens"] for k, s in samples_of(tmp_path / "out").items()
                      if k[0] == policy} for policy in dict.fromkeys(
                          k[0] for k in samples_of(tmp_path / "out")))  # fmt: skip
    assert first == second
    assert len({tuple(tokens) for tokens in first.values()}) > 8
    run(tmp_path, model, "other", policy=("static T=1 min_p=0.05",), seed=1)
    third = {k[1:]: s["tokens"] for k, s in samples_of(tmp_path / "other").items()}
    assert third != first


def test_a_model_whose_cache_cannot_be_thinned(tmp_path, model):
    """Sliding windows: drawn in one piece, as by hand."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = MistralForCausalLM(
        MistralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, sliding_window=4,
            max_position_embeddings=64, **shape,
        )
    )  # fmt: skip
    torch.nn.init.normal_(made.lm_head.weight, std=0.4)
    made.save_pretrained(tmp_path / "mistral")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "mistral")
    for size in (1, 8):
        run(tmp_path, tmp_path / "mistral", f"out{size}", batch_size=size, stop=("w7", "w1"))
    assert lines_of(tmp_path / "out1")
    for key, sample in samples_of(tmp_path / "out1").items():
        assert samples_of(tmp_path / "out8")[key]["tokens"] == sample["tokens"]


# Going on


def test_a_torn_last_line_is_drawn_again(model, tmp_path):
    whole = run(tmp_path, model, "whole", batch_size=4)
    for name, keep in {"torn": -20, "between": None, "nothing": 0, "first": 30}.items():
        evaluate(config(tmp_path, model, name, batch_size=4), console=QUIET)
        path = tmp_path / name / "samples.jsonl"
        data = path.read_bytes()
        cut = data[: len(data) // 2] if name == "torn" else data
        path.write_bytes(cut[:keep] if keep is not None else data[: data.rindex(b"\n", 0, -1) + 1])
        again = run(tmp_path, model, name, batch_size=4)
        assert lines_of(tmp_path / name) == lines_of(tmp_path / "whole")
        for policy in (*again["policies"], *whole["policies"]):
            policy.pop("tokens_per_second")
        assert again["policies"] == whole["policies"]
        whole = json.loads((tmp_path / "whole/results.json").read_text())


SLOW = """
import time
def score(completions):
    time.sleep(0.15)
    return [float(len(c) > 9) for c in completions]
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """The embedded model, and a real SIGKILL."""
    (tmp_path / "slowly.py").write_text(SLOW)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"def f{i}(x" + ", y" * i}) + "\n" for i in range(5))
    )
    monkeypatch.chdir(tmp_path)
    options = ["eval", "--model", EMBEDDED_MODEL, "--prompts", prompts, "--scorer", "slowly:score"]
    options += ["--samples", 4, "--batch-size", 2, "--max-new-tokens", 8, "--dtype", "float32"]
    options += ["--policy", "static T=1 min_p=0.1", "--policy", "greedy", "--stop", ")"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        [sys.executable, "-m", "autodeco_fast", *map(str, options), "--output", "killed"],
        env=environment,
        stderr=subprocess.PIPE,
    )
    samples = tmp_path / "killed/samples.jsonl"
    deadline = time.monotonic() + 240
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 6):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = samples.read_bytes()
    assert 6 <= before.count(b"\n") < 40
    for output in ("killed", "whole"):
        done = command(*options, "--output", output)
        assert done.returncode == 0, done.stderr
    assert samples.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    results = [
        json.loads((tmp_path / output / "results.json").read_text())["policies"]
        for output in ("killed", "whole")
    ]
    for policy in (*results[0], *results[1]):
        assert policy.pop("tokens_per_second") > 0
    assert results[0] == results[1]


def test_a_finished_run_draws_nothing_and_writes_the_same(model, tmp_path):
    first = run(tmp_path, model)
    before = (tmp_path / "out/samples.jsonl").stat().st_mtime_ns
    assert run(tmp_path, model) == first
    assert (tmp_path / "out/samples.jsonl").stat().st_mtime_ns == before


def test_more_policies_and_samples_keep_what_is_there(model, tmp_path):
    few = config(tmp_path, model, policy=POLICIES[:1], samples=2)
    evaluate(few, console=QUIET)
    before = (tmp_path / "out/samples.jsonl").read_bytes()
    more = evaluate(replace(few, policy=POLICIES[1:], samples=3), console=QUIET)
    assert [p["policy"] for p in more["policies"]] == list(POLICIES[1:])
    assert (tmp_path / "out/samples.jsonl").read_bytes().startswith(before)
    every = run(tmp_path, model)
    run(tmp_path, model, "whole")
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")
    assert [p["policy"] for p in every["policies"]] == list(POLICIES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "another run: seed 0, not 1"),
        ({"stop": ("w7",)}, "another run: stop"),
        ({"max_new_tokens": 7}, "another run: max_new_tokens 6, not 7"),
        ({"dtype": "bfloat16"}, "another run: dtype"),
    ],
)
def test_another_run_is_refused(model, tmp_path, changes, words):
    run(tmp_path, model, policy=POLICIES[:1])
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"^output ") as caught:
        run(tmp_path, model, **{"policy": POLICIES[:1], **changes})
    assert words in str(caught.value)
    assert listing(tmp_path) == before


def test_other_prompts_another_model_or_head_are_refused(model, spread_head, tmp_path):
    policy = (f"head={spread_head}",)
    run(tmp_path, model, policy=policy)
    head = TemperatureHead.from_pretrained(spread_head)
    head.offset = 0.1
    head.save_pretrained(spread_head)
    with pytest.raises(ValueError, match=r"'head=.*' was another head"):
        run(tmp_path, model, policy=policy)
    head.offset = 0.0
    head.save_pretrained(spread_head)
    other = AutoModelForCausalLM.from_pretrained(model)
    other.model.layers[0].mlp.up_proj.weight.data += 0.01
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another run: model "):
        run(tmp_path, tmp_path / "other", policy=policy)
    write_prompts(tmp_path / "prompts.jsonl", 4)
    with pytest.raises(ValueError, match="another run: prompts "):
        run(tmp_path, model, policy=policy)


def test_a_scorer_that_fails_loses_nothing(model, tmp_path, monkeypatch):
    """What was drawn is there, unscored; with the scorer mended nothing is drawn again."""
    module = tmp_path / "rules_that_fail.py"
    module.write_text(
        "seen = []\ndef f(completions):\n    seen.append(1)\n"
        "    return [1.0 if len(seen) < 2 else float('nan')] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    scored = config(tmp_path, model, scorer="rules_that_fail:f", batch_size=4)
    with pytest.raises(
        ValueError, match="scorer 'rules_that_fail:f' must return finite numbers, got nan for line"
    ):
        evaluate(scored, console=QUIET)
    samples = samples_of(tmp_path / "out")
    assert [s["score"] for s in samples.values()].count(None) == 4
    assert len(samples) == 8
    before = {key: s["tokens"] for key, s in samples.items()}
    module.write_text("def f(completions): return [len(c) / 100 for c in completions]")
    monkeypatch.delitem(sys.modules, "rules_that_fail")
    evaluate(scored, console=QUIET)
    samples = samples_of(tmp_path / "out")
    assert {key: samples[key]["tokens"] for key in before} == before
    assert all(s["score"] == len(s["text"]) / 100 for s in samples.values())
    # Another scorer: the same samples.
    tokens = {key: s["tokens"] for key, s in samples.items()}
    seconds = (tmp_path / "out/speed.jsonl").read_bytes()
    run(tmp_path, model, batch_size=4)
    samples = samples_of(tmp_path / "out")
    assert {key: s["tokens"] for key, s in samples.items()} == tokens
    assert {s["score"] for s in samples.values()} <= {0.0, 1.0}
    assert (tmp_path / "out/speed.jsonl").read_bytes() == seconds


# What comes out


def test_results_hold_everything(model, tmp_path):
    results = run(tmp_path, model)
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "eval.html", "eval.json", "results.json", "samples.jsonl", "speed.jsonl"
    ]  # fmt: skip
    assert results["settings"]["samples"] == 3
    assert {"autodeco-fast", "torch", "transformers", "python", "device"} <= set(
        results["versions"]
    )
    assert [p["family"] for p in results["policies"]] == [
        "static T min_p",
        "static T top_p",
        "greedy",
    ]
    samples = samples_of(tmp_path / "out")
    for policy in results["policies"]:
        assert policy["tokens_per_second"] > 0
        assert list(policy["tasks"]) == ["all", "t0", "t1"]
        ours = [s for key, s in samples.items() if key[0] == policy["policy"]]
        every = policy["tasks"]["all"]
        assert every["truncated"]["mean"] == pytest.approx(sum(s["truncated"] for s in ours) / 15)
        T = [t for s in ours for t in s["temperature"]]
        assert every["temperature"]["mean"] == pytest.approx(sum(T) / len(T))
        assert every["tokens"]["mean"] == pytest.approx(len(T) / 15)
        assert {"score", "pass@1", "pass@2", "pass@3", "distinct_valid@3", "distinct", "distinct_1",
                "distinct_2", "kept"} <= set(every)  # fmt: skip
        for measure in every.values():
            if measure["low"] is not None:
                assert measure["low"] <= measure["mean"] <= measure["high"]
        assert [p["line"] for p in policy["prompts"]] == [1, 2, 3, 4, 5]
        assert [p["task"] for p in policy["prompts"]] == ["t0", "t1", "t0", "t1", "t0"]
        assert all("distinct" in p for p in policy["prompts"])
    greedy = results["policies"][2]["tasks"]["all"]
    assert greedy["distinct"]["mean"] == pytest.approx(1 / 3)
    assert greedy["temperature"]["mean"] == 0.0


def test_families_and_policies_of_a_file(model, tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("cold: [static T=0.5, static T=0.6 min_p=0.1]\nhot:\n  - static T=1.5\n")
    results = run(tmp_path, model, policy=("greedy",), policies=file, samples=1)
    assert [(p["policy"], p["family"]) for p in results["policies"]] == [
        ("greedy", "greedy"),
        ("static T=0.5", "cold"),
        ("static T=0.6 min_p=0.1", "cold"),
        ("static T=1.5", "hot"),
    ]


def test_a_policy_of_ones_own(model, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Alternating(Policy):
        """Greedy for a while, then not."""

        kind = "alternating"

        def rule(self, hidden, logits):
            return (hidden[..., 0] > 0).float()

    settings = config(tmp_path, model, policy=("greedy",))
    results = evaluate(settings, policies=[Alternating(min_p=0.1)], console=QUIET)
    assert [p["policy"] for p in results["policies"]] == ["greedy", "alternating min_p=0.1"]
    samples = samples_of(tmp_path / "out")
    seen = {t for s in samples.values() if s["policy"] != "greedy" for t in s["temperature"]}
    assert seen == {0.0, 1.0}


def test_chats_go_through_the_template(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}w3 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4"
        "{% endif %}"
    )
    chat_model = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(chat_model)
    tokenizer.save_pretrained(chat_model)
    prompts = tmp_path / "prompts.jsonl"
    line = {"answer": "x", "messages": [{"role": "user", "content": "w5 w6"}]}
    prompts.write_text(
        json.dumps(line) + "\n" + json.dumps({"answer": "x", "prompt": "w3 w5 w6 w4"})
    )
    run(tmp_path, chat_model, policy=("greedy",), samples=1)
    chat, text = samples_of(tmp_path / "out").values()
    assert chat["tokens"] == text["tokens"]
    assert "user: w5 w6" in (tmp_path / "out/eval.html").read_text()


def test_the_command_prints_a_table_a_task(model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    done = command(
        "eval", "--model", model, "--prompts", prompts, "--scorer", "exact", "--output",
        tmp_path / "out", "--policy", "static T=0.9", "--policy", "greedy", "--stop", "w7",
        "--max-new-tokens", 3, "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("all (95 % intervals", "t0 (95 %", "static T=0.9", "pass@4", "written to"):
        assert words in done.stderr
    assert samples_of(tmp_path / "out")


# What is refused


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
         "prompts, line 2: messages need a chat template"),
        ('{"prompt": "' + "w5 " * 251 + '", "answer": "x"}',
         "line 2: it has 251 tokens, with max_new_tokens 6 more than the model's 256 positions"),
        (b"\xff\xfe", "line 2: not JSON"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_prompt_that_is_none_is_named_by_its_line(model, tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "w5", "answer": "x"}\n' + line + b"\n")
    refused(tmp_path, model, words)


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


def test_a_head_of_another_width_is_one_line_and_keeps_what_was_drawn(model, tmp_path):
    TemperatureHead(16).save_pretrained(tmp_path / "narrow")
    policies = ("greedy", f"head={tmp_path / 'narrow'}")
    with pytest.raises(ValueError, match=r"width 16.* 32") as caught:
        run(tmp_path, model, policy=policies)
    assert "\n" not in str(caught.value)
    assert {policy for policy, *_ in samples_of(tmp_path / "out")} == {"greedy"}


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
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"holds samples.jsonl, but no eval.json"):
        run(tmp_path, model)
    (tmp_path / "out/samples.jsonl").unlink()
    run(tmp_path, model)
    with (tmp_path / "out/samples.jsonl").open("a") as file:
        file.write('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl, line 46 is no sample"):
        run(tmp_path, model)
    assert before


def test_a_dataclass_alone_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="give either model or endpoint"):
        EvalConfig(prompts=tmp_path, scorer="exact", output=tmp_path, policy=("greedy",))
