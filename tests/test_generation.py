"""`attach` on five ways to make logits: the tokens, what is refused, and what detaching leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from transformers import GenerationConfig

from autodeco_fast import TemperatureHead, attach
from autodeco_fast.ops import linear_sample
from autodeco_fast.torch_backend import linear_sample as chunked
from tests.allocations import LargestAllocation
from tests.tiny_models import (
    VOCAB,
    both_paths,
    every_model,
    first_tokens,
    logits_and_temperature,
    min_p_distribution,
    prompts,
    tiny_head,
    tiny_model,
    undecided_prompt,
)

EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def chi_square(tokens: torch.Tensor, p: torch.Tensor) -> float:
    """The p-value of tokens `[N]` under `p [V]`; 0 if one has probability 0.

    Ids of which fewer than 10 are expected share a bin.
    """
    counts, expected = torch.bincount(tokens, minlength=len(p)).double(), p * len(tokens)
    if counts[p == 0].any():
        return 0.0
    small = expected < 10
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))


@every_model
def test_scores_are_the_logits_over_the_temperature(name):
    model, ids = tiny_model(name), prompts(3)
    head = tiny_head(model)
    z, T = logits_and_temperature(model, head, ids)
    assert T.max() > 1.3 * T.min()
    with attach(model, head, min_p=0.0):
        out = model.generate(ids, max_new_tokens=1, **EVERYTHING)
    want = (z / T[:, None]).softmax(-1)
    for got in (out.scores[0], out.logits[0]):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.softmax(-1).double(), want, rtol=2e-5, atol=1e-7)


@every_model
@both_paths
def test_tokens_follow_the_cut_softmax(name, fused):
    model = tiny_model(name)
    head = tiny_head(model)
    ids = undecided_prompt(model, head)
    z, T = logits_and_temperature(model, head, ids)
    p = min_p_distribution(z[0], T[0], 0.1)
    assert 6 < (p > 0).sum() < 24
    with attach(model, head, min_p=0.1, fused=fused):
        tokens = first_tokens(model, ids, seed=11)
    assert chi_square(tokens, p) > 1e-3
    # The test can tell.
    assert chi_square(tokens, min_p_distribution(z[0], T[0] * 1.25, 0.1)) < 1e-6
    assert chi_square(tokens, min_p_distribution(z[0], T[0], 0.3)) < 1e-6


def test_cold_heads_are_greedy():
    model, ids = tiny_model("llama"), prompts(4)
    head = tiny_head(model)
    with torch.no_grad():
        head.mlp[2].bias.fill_(-60.0)
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    for fused in (True, False):
        with attach(model, head, fused=fused):
            assert torch.equal(model.generate(ids, max_new_tokens=6), want)


@every_model
def test_inherited_settings_do_not_stack(name):
    model, ids = tiny_model(name), prompts()
    head = tiny_head(model)
    with attach(model, head):
        want = model.generate(ids, max_new_tokens=6, seed=5)
    defaults = {"temperature": 0.1, "top_k": 2, "top_p": 0.3, "min_p": 0.9, "typical_p": 0.3}
    model.generation_config = GenerationConfig(
        pad_token_id=0, do_sample=False, epsilon_cutoff=0.1, **defaults
    )
    with attach(model, head):
        assert torch.equal(model.generate(ids, max_new_tokens=6, seed=5), want)
        config = GenerationConfig(max_new_tokens=6)
        assert torch.equal(model.generate(ids, generation_config=config, seed=5), want)
        unfused = model.generate(
            ids, generation_config=config, return_dict_in_generate=True, output_scores=True, seed=5
        )
    z, T = logits_and_temperature(model, head, ids)
    assert torch.equal(unfused.scores[0].isfinite(), min_p_distribution(z, T[:, None], 0.1) > 0)
    assert config.do_sample is None  # the caller's object is left alone


def test_the_default_top_k_does_not_stack():
    model, ids = tiny_model("gemma2"), prompts(1)
    with attach(model, tiny_head(model), min_p=0.0, fused=False):
        assert len(first_tokens(model, ids, 4000).unique()) > 60


def test_settings_of_the_call_are_honoured():
    model = tiny_model("llama")
    head = tiny_head(model)
    ids = undecided_prompt(model, head)
    z, T = logits_and_temperature(model, head, ids)
    with attach(model, head, min_p=0.3):
        for kwargs, want in [
            ({"min_p": 0.02}, min_p_distribution(z[0], T[0], 0.02)),
            ({"min_p": 0.0}, min_p_distribution(z[0], T[0], 0.0)),
            ({"temperature": 2.0}, min_p_distribution(z[0], 2 * T[0], 0.3)),
            (
                {"generation_config": GenerationConfig(temperature=2.0)},
                min_p_distribution(z[0], 2 * T[0], 0.3),
            ),
        ]:
            assert chi_square(first_tokens(model, ids, seed=2, **kwargs), want) > 1e-3
        best = set(z[0].topk(2).indices.tolist())
        assert set(first_tokens(model, ids, 500, top_k=2, min_p=0.0).tolist()) == best


def test_greedy_when_asked():
    model, ids = tiny_model("qwen3"), prompts()
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    with attach(model, tiny_head(model)):
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=6), want)
        config = GenerationConfig(do_sample=False, max_new_tokens=6)
        assert torch.equal(model.generate(ids, generation_config=config), want)
        assert not torch.equal(model.generate(ids, max_new_tokens=6, seed=1), want)


@every_model
def test_the_seed_fixes_the_output(name):
    model, ids = tiny_model(name), prompts()
    for fused in (True, False):
        with attach(model, tiny_head(model), fused=fused):
            a, b, c = (model.generate(ids, max_new_tokens=6, seed=s) for s in (1, 1, 2))
            assert torch.equal(a, b)
            assert not torch.equal(a, c)
            torch.manual_seed(4)
            d = model.generate(ids, max_new_tokens=6)
            e = model.generate(ids, max_new_tokens=6)
            torch.manual_seed(4)
            assert torch.equal(model.generate(ids, max_new_tokens=6), d)
            assert not torch.equal(d, e)


@every_model
def test_plain_forwards_are_not_scaled(name):
    model, ids = tiny_model(name), prompts()
    want = model(ids, labels=ids)
    with attach(model, tiny_head(model)):
        model.generate(ids, max_new_tokens=2)
        got = model(ids, labels=ids)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)


# What is refused


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"sequence_bias": [[[5], -1.0]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[3]]},
        {"custom_generate": lambda model, **_: None},
        {"cache_implementation": "paged"},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_cannot_be_honoured_raises(kwargs):
    model, ids = tiny_model("llama"), prompts()
    with attach(model, tiny_head(model)), pytest.raises(ValueError, match=next(iter(kwargs))):
        model.generate(ids, max_new_tokens=2, **kwargs)


def test_a_refused_setting_of_the_model_raises_until_overridden():
    model, ids = tiny_model("llama"), prompts()
    model.generation_config.num_beams = 3
    with attach(model, tiny_head(model)):
        with pytest.raises(ValueError, match="num_beams"):
            model.generate(ids, max_new_tokens=2)
        assert model.generate(ids, max_new_tokens=2, num_beams=1).shape == (2, 7)


def test_continuous_batching_raises():
    model = tiny_model("llama")
    with attach(model, tiny_head(model)), pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[3, 4]])


def test_attaching_checks():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"32.*33"):
        attach(model, TemperatureHead(32))
    with pytest.raises(ValueError, match="min_p"):
        attach(model, tiny_head(model), min_p=1.5)
    with pytest.raises(TypeError, match="Linear"):
        attach(torch.nn.Linear(2, 2), TemperatureHead(2))
    with pytest.raises(TypeError, match=r"attach to its model, like pipe\.model$"):
        attach(SimpleNamespace(model=model), tiny_head(model))
    with pytest.raises(TypeError, match=r"attach to the model before compiling it$"):
        attach(torch.compile(model, backend="eager"), tiny_head(model))
    with pytest.raises(TypeError, match=r"attach to the model inside it, its \.module$"):
        attach(torch.nn.DataParallel(model), tiny_head(model))
    attached = attach(model, tiny_head(model))
    assert repr(attached) == "Attachment(GPT2LMHeadModel, 'head='<in memory>' min_p=0.1')"
    attached.detach()
    assert repr(attached).endswith(", detached)")
    with attach(model, tiny_head(model)), pytest.raises(ValueError, match="already"):
        attach(model, tiny_head(model))


def test_a_replaced_output_embedding_raises():
    model, ids = tiny_model("llama"), prompts()
    with attach(model, tiny_head(model)):
        model.resize_token_embeddings(VOCAB + 4)
        with pytest.raises(RuntimeError, match="attach"):
            model.generate(ids, max_new_tokens=2)


# What detaching leaves


@every_model
def test_detaching_restores_the_model_bit_for_bit(name, tmp_path):
    model, ids = tiny_model(name), prompts()
    cls, state = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    config, sampled = model.generation_config.to_dict(), {"do_sample": True, "max_new_tokens": 6}

    def outputs():
        torch.manual_seed(3)
        return model.generate(ids, **EVERYTHING, **sampled)

    before = outputs()
    attachment = attach(model, tiny_head(model))
    assert type(model) is not cls
    assert isinstance(model, cls)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [cls.__name__]
    model.generate(ids, max_new_tokens=3)
    attachment.detach()
    attachment.detach()
    assert type(model) is cls
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not {"generate", "_sample", "_compiled_call"} & set(vars(model))
    assert model.generation_config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    after = outputs()
    assert torch.equal(before.sequences, after.sequences)
    for key in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(before[key], after[key]))


def test_errors_inside_the_block_detach():
    model = tiny_model("llama")
    cls = type(model)
    with pytest.raises(ZeroDivisionError), attach(model, tiny_head(model)):
        _ = 1 / 0
    assert type(model) is cls


def test_no_logits_in_the_decode_loop(monkeypatch):
    """No `[B, V]` tensor is stored with the fused sampler alone in charge, one with a processor."""
    monkeypatch.setattr(linear_sample, "FUSED_BYTES", 0)  # else a CPU makes logits this small
    monkeypatch.setattr(chunked, "CHUNK", 0)
    monkeypatch.setattr(chunked, "COLUMNS", 40)  # of 96
    model, ids = tiny_model("llama"), prompts()
    with attach(model, tiny_head(model)) as attachment, LargestAllocation(VOCAB) as seen:
        model.generate(ids, max_new_tokens=5, seed=0)
        assert attachment.lazy
        assert seen.numel < VOCAB
        model.generate(ids, max_new_tokens=5, seed=0, repetition_penalty=1.1)
        assert seen.numel >= len(ids) * VOCAB


@every_model
def test_tokens_are_the_same_with_and_without_logits(name):
    """Token by token, but for near-ties: the same noise on the same logits."""
    model, ids = tiny_model(name), prompts()
    with attach(model, tiny_head(model)) as attachment:
        without = model.generate(ids, max_new_tokens=12, seed=3)
        assert attachment.lazy
        attachment.lazy = False
        assert torch.equal(without, model.generate(ids, max_new_tokens=12, seed=3))


def test_someone_elses_hook_sees_logits():
    model, ids = tiny_model("llama"), prompts()
    widths = set()

    def hook(_, args, logits):
        widths.add(logits.shape[-1])

    with attach(model, tiny_head(model)), model.lm_head.register_forward_hook(hook):
        model.generate(ids, max_new_tokens=3, seed=0)
    assert widths == {VOCAB}
