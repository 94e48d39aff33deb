"""A run that was killed, or is asked for more, goes on to the same samples; another is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training.evaluate import evaluate
from tests.checkpoint_folders import chat_model
from tests.commands import ROOT, command, listing
from tests.evaluations import (
    POLICIES,
    QUIET,
    config,
    lines_of,
    run,
    samples_of,
    without_speeds,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.mark.parametrize("left", [0, 30, 0.5, -20, "lines"])
def test_a_torn_last_line_is_drawn_again(model, tmp_path, left):
    """Left of samples.jsonl: so many bytes, that share, all but so many, or all but a line."""
    whole = run(tmp_path, model, "whole", batch_size=4)
    run(tmp_path, model, "torn", batch_size=4)
    path = tmp_path / "torn/samples.jsonl"
    data = path.read_bytes()
    end = data.rindex(b"\n", 0, -1) + 1 if left == "lines" else left
    path.write_bytes(data[: int(len(data) * end) if end == 0.5 else end])
    again = run(tmp_path, model, "torn", batch_size=4)
    assert lines_of(tmp_path / "torn") == lines_of(tmp_path / "whole")
    assert without_speeds(again) == without_speeds(whole)


SLOW = """
import os, time
def score(completions):
    time.sleep(float(os.environ.get("SECONDS", "0")))
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECONDS": "0.15"}
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
    killed, whole = (
        json.loads((tmp_path / output / "results.json").read_text())
        for output in ("killed", "whole")
    )
    assert without_speeds(killed) == without_speeds(whole)
    assert all(policy["tokens_per_second"] > 0 for policy in killed["policies"])


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


def test_samples_of_an_earlier_format_are_refused(model, tmp_path):
    run(tmp_path, model, policy=POLICIES[:1])
    path = tmp_path / "out/eval.json"
    manifest = json.loads(path.read_text()) | {"format": 2}
    del manifest["prompt_ids"], manifest["ends"]  # which it did not hold
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another run: format 2, not 3"):
        run(tmp_path, model, policy=POLICIES[:1])


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


@pytest.mark.parametrize(
    ("turn", "ends", "words"),
    [
        ("w4 {{ m.content }} ", 1, "another run: prompt_ids "),
        ("w3 {{ m.content }} ", [1, 40], r"another run: ends \[1\], not \[1, 40\]"),
    ],
)
def test_another_template_or_other_ends_are_refused(model, tmp_path, turn, ends, words):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"answer": "x", "messages": [{"role": "user", "content": "w5"}]}\n')
    begun, _ = chat_model(model, tmp_path / "begun", turn="w3 {{ m.content }} ", answer="w9")
    run(tmp_path, begun, policy=POLICIES[:1])
    other, _ = chat_model(model, tmp_path / "other", turn=turn, answer="w9")
    GenerationConfig(eos_token_id=ends).save_pretrained(other)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, other, policy=POLICIES[:1])


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
