"""The training loop on tiny models: what it computes, what it writes, what it refuses."""

import json

import pytest
import torch
import transformers

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import OnlineSource
from autodeco_fast.training.data import Example
from autodeco_fast.training.loop import learning_rate
from tests.tiny_models import NAMES, VOCAB, tiny_model
from tests.training_runs import (
    make_examples,
    online_config,
    train_online,
)


@pytest.mark.parametrize("name", NAMES)
def test_sees_what_the_output_embedding_sees(name):
    model = tiny_model(name)
    base = base_model.wrap(model)
    ids = torch.randint(3, VOCAB, (1, 7))
    caught = []
    with model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: caught.append(args[0])
    ):
        want = model(ids).logits[0].float()
    assert torch.equal(base.hidden(ids), caught[0])
    torch.testing.assert_close(base.logits(base.hidden(ids)[0]), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        base.stats(base.hidden(ids)[0], ids[0]).logsumexp, want.logsumexp(-1)
    )
    base.verify(ids)


def test_an_unknown_transform_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _, args, out: out.tanh())
    with pytest.raises(ValueError, match="transforms its logits in a way that is not supported"):
        base_model.wrap(model).verify(torch.randint(3, VOCAB, (1, 7)))


def capped(cap):
    def hook(_, args, output):
        output.logits = torch.tanh(output.logits / cap) * cap
        return output

    return hook


def test_an_unknown_cap_is_refused_where_logits_are_small():
    model = tiny_model("llama")
    cap = 100 * model(torch.arange(3, 10)[None]).logits.abs().max()
    handle = model.register_forward_hook(capped(cap))
    with pytest.raises(ValueError, match="transforms its logits in a way that is not supported"):
        base_model.wrap(model).verify(torch.arange(3, 10)[None])
    handle.remove()
    base_model.wrap(model).verify(torch.arange(3, 10)[None])


@pytest.mark.parametrize("cap", ["logits_soft_cap", "output_logit_soft_cap"])
def test_a_cap_of_another_name_is_applied(cap):
    model = tiny_model("llama")
    setattr(model.config, cap, 2.0)
    model.register_forward_hook(capped(2.0))
    base_model.wrap(model).verify(torch.arange(3, 10)[None])


def test_hidden_states_changed_before_the_embedding_are_refused():
    """As MiniCPM3 does, which divides them: its logits agree, but `generate` would show the head
    another h."""
    if not hasattr(transformers, "MiniCPM3Config"):
        pytest.skip("this transformers has no MiniCPM3")
    torch.manual_seed(0)
    config = transformers.MiniCPM3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        pad_token_id=0,
        dim_model_base=8,
    )
    with pytest.raises(ValueError, match="changes hidden states before its output embedding"):
        base_model.wrap(transformers.MiniCPM3ForCausalLM(config)).verify(torch.arange(3, 10)[None])


def test_heads_that_are_more_than_their_weight_are_refused():
    def adapted(head):
        head.base_layer = head.weight

    def quantised(head):
        head.weight = torch.nn.Parameter(
            torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False
        )

    def elsewhere(head):
        head.weight = torch.nn.Parameter(torch.zeros(0), requires_grad=False)

    for change, words in (
        (adapted, r"carries an adapter \(LoRA\): merge it first"),
        (quantised, "weight must be a floating-point tensor, got torch.int8: dequantize"),
        (elsewhere, "weight is not on this device"),
    ):
        model = tiny_model("llama")
        change(model.lm_head)
        with pytest.raises(ValueError, match=words):
            base_model.wrap(model)


def test_accumulation_changes_nothing(tmp_path):
    """Examples are of unequal length: a mean of batch means would differ."""
    whole, _ = train_online(tmp_path, "a", per_device_train_batch_size=8)
    accumulated, _ = train_online(
        tmp_path, "b", per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    for a, b in zip(whole.parameters(), accumulated.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_processes_share_a_step(tmp_path):
    settings = online_config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    examples = [Example([3 + i] * 4, [-100, -100, 3 + i, 3 + i]) for i in range(21)]
    source = OnlineSource(base_model.wrap(tiny_model("llama")), examples, settings)
    seen = []
    for step in range(source.steps_per_epoch(2)):
        shares = [
            [(batch.target.unique() - 3).tolist() for batch in source.batches(0, step, rank, 2)]
            for rank in range(2)
        ]
        assert all(len(batch) <= 2 for share in shares for batch in share)
        seen.append(sorted(i for share in shares for batch in share for i in batch))
    assert [len(step) for step in seen] == [8, 8, 5]
    assert sorted(i for step in seen for i in step) == list(range(21))


@pytest.mark.slow
def test_learns_the_quantile(tmp_path):
    """With gravity λ, 1 − λ of the reachable tokens end inside the cut."""
    for gravity in (0.1, 0.4):
        options = {
            "gravity": gravity,
            "min_p": 0.03,
            "num_train_epochs": 120,
            "learning_rate": 2e-3,
        }
        _, metrics = train_online(
            tmp_path,
            f"g{gravity}",
            examples=make_examples(128),
            per_device_train_batch_size=128,
            **options,
        )
        assert abs(metrics[-1]["coverage"] - (1 - gravity)) < 0.08
        assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_writes_a_head_and_a_line_a_step(tmp_path):
    head, metrics = train_online(tmp_path, num_train_epochs=2)
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert sum(m["target_tokens"] for m in metrics) == 2 * sum(
        len(r.input_ids) - 2 for r in make_examples(16)
    )
    loaded = TemperatureHead.from_pretrained(tmp_path / "out")
    for a, b in zip(head.parameters(), loaded.parameters()):
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "out/training.json").read_text())["gravity"] == 0.1
    with pytest.raises(ValueError, match="holds a head already"):
        train_online(tmp_path)


def test_the_same_seed_gives_the_same_head(tmp_path):
    heads = [
        train_online(tmp_path, name, easy_fraction=0.5, trivial_prob=0.0, seed=seed)[0]
        for name, seed in zip("abc", (1, 1, 2))
    ]
    same = [
        all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), h.parameters()))
        for h in heads[1:]
    ]
    assert same == [True, False]


def test_nothing_to_learn_from_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="no token was left to learn from: easy_fraction 0 dropped all 2 targets"
    ):
        train_online(tmp_path, max_rank=0, trivial_prob=0.0, easy_fraction=0.0)
    assert not (tmp_path / "out/autodeco_config.json").exists()


def test_learning_rate_warms_up_and_ends():
    factors = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1.0
    assert factors == factors[:10] + sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.01
    assert learning_rate(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_p": 1.0}, r"min_p must be in \(0, 1\), got 1.0"),
        ({"gravity": -1}, r"gravity must be in \[0, 1\), got -1"),
        ({"gravity": 1.0}, r"gravity must be in \[0, 1\), got 1.0"),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size must be at least 1, got 0",
        ),
        ({"easy_fraction": 2.0}, r"easy_fraction must be in \[0, 1\], got 2.0"),
    ],
)
def test_settings_are_checked(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        online_config(tmp_path, **options)
