"""Training on rewards, on a tiny model: it learns, entropy is held, resumed runs end in the same
bits."""

from pathlib import Path

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import training_settings
from autodeco_fast.training import base_model, rewards
from tests import reward_runs
from tests.reward_runs import config_of, even_share, some_prompts, train
from tests.tiny_models import tiny_model
from tests.training_runs import equal


def repetition(prompts, completions, **columns):
    """The share of the commonest id: what low temperatures are good at."""
    words = [c.split() for c in completions]
    return [max(map(w.count, w)) / len(w) for w in words]


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


def test_clipped_advantages_give_the_gradient_of_ppo():
    g = torch.Generator().manual_seed(0)
    old, advantage = (torch.randn(200, generator=g) for _ in range(2))
    log_prob = (old + 0.3 * torch.randn(200, generator=g)).requires_grad_()
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    torch.minimum(ratio * advantage, clipped * advantage).sum().backward()
    found = rewards.clipped_advantage(advantage, ratio.detach(), 0.2)
    torch.testing.assert_close(found, log_prob.grad)
    assert 20 < (found == 0).sum() < 180


def test_more_steps_on_the_same_rollouts_learn_more(tmp_path):
    options = {"rounds": 6, "learning_rate": 0.003, "entropy_weight": 0.0}
    _, one = train(tmp_path / "one", **options)
    _, four = train(tmp_path / "four", **options, num_iterations=4)
    assert four[0] == one[0]  # a round is told of as it was sampled
    assert four[1]["temperature"] != one[1]["temperature"]
    moved = [abs(m[-1]["temperature"] - m[0]["temperature"]) for m in (one, four)]
    assert moved[1] > 1.5 * moved[0]


def test_batches_change_nothing(tmp_path):
    whole, _ = train(tmp_path / "a", num_iterations=2, batch_tokens=8192)
    split, _ = train(tmp_path / "b", num_iterations=2, batch_tokens=40)
    for a, b in zip(whole.parameters(), split.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    options = {"target_entropy": 1.5, "rounds": 6, "save_steps": 2, "num_iterations": 2}
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


def test_a_run_on_other_prompt_ids_or_ends_is_not_resumed(tmp_path, monkeypatch):
    """As a changed chat template or generation configuration makes them; nor one of a model with
    the same LM head."""

    def stop(metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_round=stop)
    base = base_model.wrap(tiny_model("llama"))
    base.model.generation_config.eos_token_id = [41, 40]
    with pytest.raises(ValueError, match=r"was begun with ends \[\], got \[40, 41\]: resume with"):
        train(tmp_path, base=base, resume=True)
    base = base_model.wrap(tiny_model("llama"))
    torch.nn.init.ones_(base.model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="was begun with weights "):
        train(tmp_path, base=base, resume=True)
    prompts = [prompt._replace(ids=[*prompt.ids, 3]) for prompt in some_prompts()]
    monkeypatch.setattr(reward_runs, "some_prompts", lambda: prompts)
    with pytest.raises(ValueError, match="was begun with prompt_ids "):
        train(tmp_path, resume=True)


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
    """Nor do they when rounds were saved, or a resume finds that none is left."""
    same = {"reward": lambda completions, **_: [0.5] * len(completions), "rounds": 2}
    for options in ({}, {"save_steps": 1}, {"save_steps": 1, "resume": True}):
        with pytest.raises(ValueError, match="no round had rewards that differ"):
            train(tmp_path / f"out{len(options) > 0}", **same, **options)
    assert list(tmp_path.glob("out*/metrics.jsonl"))
    assert not list(tmp_path.glob("out*/autodeco_config.json"))


def test_starts_from_a_head(tmp_path):
    start = TemperatureHead(32, min_p=0.03)
    torch.nn.init.normal_(start.mlp[2].weight, std=0.1)
    start.save_pretrained(tmp_path / "start")
    head, _ = train(tmp_path / "out", head=tmp_path / "start", learning_rate=1e-6, rounds=1)
    assert head.min_p == training_settings(tmp_path / "out")["min_p"] == 0.03
    for a, b in zip(start.parameters(), head.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    TemperatureHead(16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        ValueError, match="head has width 16, the model's output embedding takes 32"
    ):
        train(tmp_path / "no", head=tmp_path / "narrow")
    (tmp_path / "start/training.json").write_text('{"lm_head": "another"}')
    with pytest.raises(ValueError, match="was trained for another model: its lm_head is another"):
        train(tmp_path / "no", head=tmp_path / "start")
    assert not (tmp_path / "no").exists()
