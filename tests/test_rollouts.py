"""Rollouts: which completions there are, where they end, and what is known of their tokens."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AddedToken

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model, rewards
from autodeco_fast.training.eval_model import LocalModel, _Row
from autodeco_fast.training.recorded import Recorded, group_rollouts, read_rollouts
from autodeco_fast.training.rollouts import OnPolicy, Rollout, advantages, chosen
from tests.reward_runs import config_of, even_share, numbers, rollouts_of, some_prompts
from tests.tiny_models import every_model, tiny_model


def test_advantages():
    assert advantages([1.0, 0.0, 0.0, 1.0], scale=False) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([3.0, 1.0], scale=True) == [1.0, -1.0]
    assert advantages([2.0, 2.0], scale=True) == [0.0, 0.0]
    # Three times 0.1 over three is another number.
    for scale in (False, True):
        assert advantages([0.1, 0.1, 0.1], scale=scale) == [0.0, 0.0, 0.0]


def test_every_prompt_has_its_turn():
    turns = [list(chosen(10, round, count=4, seed=3)) for round in range(5)]
    numbers = [number for turn in turns for number, _ in turn]
    indices = [index for turn in turns for _, index in turn]
    assert numbers == list(range(20))
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_a_completion_does_not_depend_on_the_batch(tmp_path):
    at_once, alone = (
        rollouts_of(config_of(tmp_path, generation_batch_size=n), some_prompts()) for n in (256, 8)
    )
    assert [r[:4] for r in at_once] == [r[:4] for r in alone]
    assert len(at_once) == 64
    assert len({tuple(r.example.input_ids) for r in at_once}) > 60  # a prompt's are not one another


def test_completions_end_where_they_should(tmp_path):
    """At an id that ends them, at a text, or at the limit; what follows is padding, and no
    target."""
    tokenizer = numbers()
    tokenizer.eos_token = "40"
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


@every_model
def test_statistics_are_of_what_the_sampler_saw(tmp_path, name):
    """T, cut and tokens agree, and the hidden states are those of the model run over the whole
    example: prompts are shared and padded on the left, whatever the model makes of positions."""
    config = config_of(tmp_path)
    base = base_model.wrap(tiny_model(name))
    run = rewards._Run(None, base, config, Accelerator())
    torch.nn.init.normal_(run.head.mlp[2].weight, std=1.0)
    source = OnPolicy(base, numbers(), some_prompts(), even_share, config)
    rollouts = source.rollouts(0, run.head, 0, 1)
    again = [rollout._replace(hidden=None) for rollout in rollouts]
    for ours, theirs in zip(run._tokens(rollouts), run._tokens(again)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    sums = run._sums(rollouts, 0)
    assert sums.temperature.std() > 0.1
    assert (sums.stats.rank < sums.stats.kept).all()
    assert int((sums.weight > 0).sum()) == 64 * 12


def test_a_special_token_may_end_a_completion(tmp_path):
    tokenizer = numbers()
    tokenizer.add_tokens([AddedToken("40", special=True)])
    options = {"max_completion_length": 30, "stop": "40"}
    found = rollouts_of(config_of(tmp_path, **options), some_prompts(), tokenizer)
    for rollout in found:
        labels = [y for y in rollout.example.labels if y != -100]
        assert 40 not in labels[:-1]
        assert rollout.truncated == (labels[-1] != 40)
    assert 5 < sum(rollout.truncated for rollout in found) < len(found) - 5


def test_groups_of_recorded_rollouts_are_whole():
    rollouts = [[Rollout(None, float(i), 0.0, False)] * 3 for i in range(5)]
    config = config_of(Path("out"), rollouts=Path("r"), prompts_per_round=2)
    found = Recorded(rollouts, config).rollouts(0, None, 0, 1)
    shared = [Recorded(rollouts, config).rollouts(0, None, rank, 2) for rank in range(2)]
    assert len(found) == 6
    assert sorted(r.reward for r in found) == sorted(r.reward for part in shared for r in part)


def test_a_group_is_one_of_a_name_or_of_a_prompt(tmp_path):
    """null is no name, and a prompt is none that is written like it."""
    base = base_model.wrap(tiny_model("llama"))
    lines = [
        {"prompt": prompt, "completion": " 6", "reward": float(i), **group}
        for i, (prompt, group) in enumerate(
            [("3", {"group": None}), ("4", {"group": None}), ("3", {}), ("5", {"group": "3"})]
        )
    ]
    found = group_rollouts(numbers(), lines, base, config_of(tmp_path))
    assert [[rollout.reward for rollout in group] for group in found] == [[0.0, 2.0], [1.0], [3.0]]
    assert [rollout.advantage for rollout in found[0]] == [-1.0, 1.0]


def test_recorded_rollouts_are_known_by_their_ids(tmp_path):
    """Another chat template makes others of the same file."""
    base, tokenizer, config = base_model.wrap(tiny_model("llama")), numbers(), config_of(tmp_path)
    ask, said = ([{"role": r, "content": c}] for r, c in (("user", "5"), ("assistant", "6 7")))
    lines = [{"prompt": ask, "completion": said, "reward": float(i)} for i in range(2)]
    known = []
    for begin in (3, 3, 4):
        turn = f"{begin} {{{{ m.content }}}} 40 "
        tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
        groups = group_rollouts(tokenizer, lines, base, config)
        known.append(Recorded(groups, config).identity())
    assert known[0] == known[1] != known[2]


def test_truncated_is_true_or_false(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    line = {"prompt": "3", "completion": "6", "reward": 1, "truncated": "false"}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="line 1: truncated must be true or false, got 'false'"):
        read_rollouts(path)


def test_a_recorded_chat_that_was_cut_off_has_no_end(tmp_path):
    """Its end is one of the model's, not the tokenizer's, and the template writes on behind it."""
    tokenizer = numbers()
    tokenizer.chat_template = "{% for m in messages %}3 {{ m.content }} 40 4 {% endfor %}"
    base = base_model.wrap(tiny_model("llama"))
    base.model.generation_config.eos_token_id = [41, 40]
    ask, said = ([{"role": r, "content": c}] for r, c in (("user", "5"), ("assistant", "6 7")))
    lines = [
        {"prompt": ask, "completion": said, "reward": float(cut), "truncated": cut}
        for cut in (True, False)
    ]
    ((cut, whole),) = group_rollouts(tokenizer, lines, base, config_of(tmp_path))
    assert [y for y in cut.example.labels if y != -100] == [3, 6, 7]
    assert [y for y in whole.example.labels if y != -100] == [3, 6, 7, 40]
    assert (cut.truncated, whole.truncated) == (True, False)


def test_a_reward_and_an_evaluation_are_shown_the_same_text(tmp_path):
    """What stands before the stop string; what is learned from are the tokens that were drawn."""
    tokenizer, seen = numbers(), []
    tokenizer.eos_token = "40"

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    base = base_model.wrap(tiny_model("llama"))
    config = config_of(tmp_path, max_completion_length=30, stop="7 5")
    source = OnPolicy(base, tokenizer, some_prompts(), reward, config)
    rollouts = source.rollouts(0, TemperatureHead(32, min_p=0.1), 0, 1)
    leads = {tuple(prompt.ids): prompt.lead for prompt in source.prompts}
    evaluation = LocalModel(base.model, tokenizer, [], max_new_tokens=30, stop=["7 5"])
    drawn = []
    for text, (example, *_) in zip(seen, rollouts, strict=True):
        drawn.append([y for y in example.labels if y != -100])
        asked = tuple(example.input_ids[: -len(drawn[-1])])
        assert evaluation._drawn(_Row(drawn[-1], [], []), leads[asked]).text == text
        assert "40" not in text.split()
        assert "7 5" not in text
    assert any("7 5" in tokenizer.decode(ids) for ids in drawn)
    assert any(ids[-1] == 40 for ids in drawn)


def test_the_models_own_generation_settings_do_not_count(tmp_path):
    base = base_model.wrap(tiny_model("llama"))
    config = config_of(tmp_path)
    plain = OnPolicy(base, numbers(), some_prompts(), even_share, config)
    head = TemperatureHead(32, min_p=0.1)
    expected = [rollout[:4] for rollout in plain.rollouts(0, head, 0, 1)]
    own = base.model.generation_config
    own.update(repetition_penalty=1.5, no_repeat_ngram_size=1, temperature=0.1, top_k=2)
    assert [rollout[:4] for rollout in plain.rollouts(0, head, 0, 1)] == expected
    assert base.model.generation_config is own
