"""Base models that name their width otherwise, have quantised LM heads, or other defaults."""

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from autodeco_fast import AutoDecoConfig, AutoDecoModelForCausalLM
from autodeco_fast.autodeco import convert, loading
from tests.autodeco_checkpoints import HIDDEN, base_model
from tests.output_embeddings import Method, Nameless, Packed
from tests.tiny_models import VOCAB, prompts

load = AutoDecoModelForCausalLM.from_pretrained
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> GPT2LMHeadModel:
    """`n_embd` is its width."""
    return GPT2LMHeadModel(GPT2Config(**IDS, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64))


def opt() -> OPTForCausalLM:
    """48 wide inside, 32 where its logits are made."""
    sizes = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"hidden_size": 48, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**IDS, **sizes))


@pytest.mark.parametrize("made", [gpt2, opt])
def test_the_width_is_that_of_the_output_embedding(made, tmp_path):
    made().save_pretrained(tmp_path / "base")
    base, ids = str(tmp_path / "base"), prompts()
    convert.construct(base, tmp_path / "heads")
    model = load(tmp_path / "heads")
    assert model.temp_head.hidden_size == model.top_p_head.hidden_size == HIDDEN
    nn.init.normal_(model.temp_head.mlp[2].weight)
    config = AutoDecoConfig.of(model.llm.config, base)
    assert config.to_dict() == model.config.to_dict()
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "merged", heads_only=False)
    convert.merge(base, str(tmp_path / "again"), tmp_path / "joined")
    expected = model(ids)
    assert expected.temp_logits.std() > 0
    for name in ("again", "merged", "joined"):
        got = load(tmp_path / name)(ids)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.temp_logits, expected.temp_logits)


@pytest.mark.parametrize("layer", [Packed, Nameless, Method])
def test_quantised_lm_heads(checkpoint, layer, monkeypatch, tmp_path):
    expected, original = load(checkpoint("qwen2"))(prompts()), loading.causal_lm.load

    def quantised(name, **options):
        model = original(name, **options)
        model.lm_head = layer(model.lm_head)
        return model

    monkeypatch.setattr(loading.causal_lm, "load", quantised)
    model = load(checkpoint("qwen2"))
    got = model(prompts())
    assert torch.equal(got.temp_logits, expected.temp_logits)
    assert torch.equal(got.top_p_logits, expected.top_p_logits)
    model.save_pretrained(tmp_path / "a")
    assert load(tmp_path / "a").temp_head.hidden_size == HIDDEN


@pytest.mark.parametrize("heads_only", [True, False], ids=["heads", "merged"])
def test_the_checkpoints_generation_configuration_is_the_models(tmp_path, heads_only):
    base = base_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = AutoDecoModelForCausalLM(
        AutoDecoConfig.of(base.config, str(tmp_path / "base")), llm=base
    )
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "a", heads_only=heads_only)
    assert load(tmp_path / "a").generation_config.max_new_tokens == 7
    given = GenerationConfig(max_new_tokens=3)
    other = load(tmp_path / "a", generation_config=given)
    assert other.generation_config.max_new_tokens == 3
    (tmp_path / "a/generation_config.json").unlink()
    plain = load(tmp_path / "a").generation_config  # the base's
    assert plain.max_new_tokens is None


def test_a_broken_generation_configuration_is_one_line(checkpoint, tmp_path):
    load(checkpoint("llama")).save_pretrained(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config\.json must hold a JSON object"):
        load(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        load(tmp_path / "a")
