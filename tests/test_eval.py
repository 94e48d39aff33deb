"""A run of `autodeco-fast eval`: the same samples in any batch, and what comes out."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from autodeco_fast import attach
from autodeco_fast.policies import Policy, parse
from autodeco_fast.training.eval_requests import seed_of
from autodeco_fast.training.evaluate import evaluate
from tests.checkpoint_folders import chat_model
from tests.commands import command
from tests.evaluations import (
    POLICIES,
    QUIET,
    config,
    lines_of,
    run,
    samples_of,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("without_figures")

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
        of_prompt, whole = (
            tokenizer.decode(some, skip_special_tokens=True) for some in (ids, ids + expected[:n])
        )
        text = whole.removeprefix(of_prompt)
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


def test_a_special_token_may_end_a_sample(model, tmp_path):
    """Where it does as a text; what is decoded does not hold it."""
    shutil.copytree(model, tmp_path / "special")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("w95", special=True)])
    tokenizer.save_pretrained(tmp_path / "special")
    options = {"stop": ("w95",), "max_new_tokens": 24}
    run(tmp_path, model, "text", **options)
    run(tmp_path, tmp_path / "special", "token", **options)
    as_text, as_token = (samples_of(tmp_path / name) for name in ("text", "token"))
    for key, sample in as_text.items():
        for name in ("tokens", "truncated"):
            assert as_token[key][name] == sample[name]
        assert as_token[key]["text"] == sample["text"].rstrip()
    assert any(sample["tokens"][-1] == 95 for sample in as_token.values())


@pytest.mark.parametrize(
    "own",
    [
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"cache_implementation": "static"},
        {"num_beams": 4},
        {"min_new_tokens": 4, "repetition_penalty": 1.5},
        {"exponential_decay_length_penalty": [2, 1.5]},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_models_own_generation_settings_do_not_count(model, tmp_path, own):
    run(tmp_path, model, "plain", policy=POLICIES[:1])
    shutil.copytree(model, tmp_path / "own")
    path = tmp_path / "own/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    run(tmp_path, tmp_path / "own", policy=POLICIES[:1])
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "plain")


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
    assert [p["over_fixed"] for p in results["policies"]] == [{}] * 3
    greedy = results["policies"][2]["tasks"]["all"]
    assert greedy["distinct"]["mean"] == pytest.approx(1 / 3)
    assert greedy["temperature"]["mean"] == 0.0


def test_other_policies_are_held_against_fixed_ones(model, spread_head, tmp_path):
    head = f"head={spread_head} min_p=0.02"
    policies = ("greedy", "static T=1", head)
    results = run(tmp_path, model, policy=policies)
    over = results["policies"][2]["over_fixed"]
    assert list(over) == ["all", "t0", "t1"]
    for kinds in over.values():
        assert list(kinds) == ["distinct", "distinct_2"]
    assert "Over fixed: the score less" in (tmp_path / "out/eval.html").read_text()
    assert "over fixed at equal distinct-2" in (tmp_path / "out/eval.html").read_text()


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
    turn = "w3 {{ m.content }} "
    folder, _ = chat_model(model, tmp_path / "chat", turn=turn, answer="w4")
    prompts = tmp_path / "prompts.jsonl"
    line = {"answer": "x", "messages": [{"role": "user", "content": "w5 w6"}]}
    prompts.write_text(
        json.dumps(line) + "\n" + json.dumps({"answer": "x", "prompt": "w3 w5 w6 w4"})
    )
    run(tmp_path, folder, policy=("greedy",), samples=1)
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
    assert "…" not in done.stderr
    assert samples_of(tmp_path / "out")
