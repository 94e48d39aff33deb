"""What a call of `generate` says is honoured or refused; rows that are broken raise."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from autodeco_fast import attach
from autodeco_fast.policies import Static
from tests.tiny_models import (
    both_paths,
    every_model,
    prompts,
    tiny_head,
    tiny_model,
)

SPELLED_OUT = {
    **{"num_beams": 1, "length_penalty": 1.0, "repetition_penalty": 1.0, "early_stopping": False},
    **{"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_return_sequences": 1, "max_new_tokens": 6},
}


@both_paths
def test_a_configuration_that_says_everything_is_honoured(fused):
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model)

    def run(**settings):
        config = GenerationConfig(**{**SPELLED_OUT, **settings})
        return model.generate(ids, generation_config=config, seed=2)

    greedy = model.generate(ids, do_sample=False, max_new_tokens=6)
    with attach(model, head, fused=fused):
        plain = model.generate(ids, max_new_tokens=6, seed=2)
        assert torch.equal(run(), plain)
        assert torch.equal(run(do_sample=False), greedy)
        assert torch.equal(
            run(temperature=0.7), model.generate(ids, max_new_tokens=6, temperature=0.7, seed=2)
        )
        assert torch.equal(run(top_k=50), model.generate(ids, max_new_tokens=6, top_k=50, seed=2))
        assert torch.equal(run(top_k=1), greedy)
        assert not torch.equal(run(temperature=0.7), plain)


def test_what_a_configuration_says_counts_though_the_model_s_says_the_same():
    model, ids = tiny_model("llama"), prompts()
    model.generation_config.update(temperature=0.7, do_sample=False, eos_token_id=95)
    copied = copy.deepcopy(model.generation_config)
    copied.max_new_tokens = 4
    with attach(model, tiny_head(model), record=True) as attached:

        def first(**options):
            model.generate(ids, seed=0, **options)
            return attached.records[0].temperature

        plain = first(max_new_tokens=4)
        torch.testing.assert_close(first(max_new_tokens=4, temperature=0.7), 0.7 * plain)
        own = GenerationConfig(max_new_tokens=4, temperature=0.7)
        torch.testing.assert_close(first(generation_config=own), 0.7 * plain)
        for inherited in (copied, model.generation_config):
            assert torch.equal(first(generation_config=inherited, max_new_tokens=4), plain)
        greedy = GenerationConfig(max_new_tokens=4, do_sample=False)
        model.generate(ids, generation_config=greedy)
        assert attached.records == []


def test_cuts_of_a_call_stand_in_place_of_a_policy_s():
    model, ids = tiny_model("llama"), prompts()
    for name, own, others in (("top_k", 3, (0, 10)), ("top_p", 0.3, (1.0, 0.6))):
        with attach(model, Static(temperature=1.0, **{name: own}), record=True) as attached:
            sizes = []
            for options in ({}, *({name: value} for value in others)):
                model.generate(ids, max_new_tokens=1, seed=0, **options)
                sizes.append(int(attached.records[0].kept[0]))
        assert sizes[0] < sizes[2] < sizes[1] == 96


def test_the_head_knows_its_min_p():
    model = tiny_model("llama")
    head, ids = tiny_head(model), prompts()
    head.min_p = 0.6
    with attach(model, head):
        own = model.generate(ids, max_new_tokens=12, seed=0)
        with pytest.warns(UserWarning, match=r"min_p=0\.2.*0\.6"):
            model.generate(ids, max_new_tokens=2, min_p=0.2)
    with pytest.warns(UserWarning, match=r"min_p=0\.1.*0\.6"):
        attachment = attach(model, head, min_p=0.1)
    assert not torch.equal(model.generate(ids, max_new_tokens=12, seed=0), own)
    attachment.detach()
    head.min_p = None
    with attach(model, head, min_p=0.6):
        assert torch.equal(model.generate(ids, max_new_tokens=12, seed=0), own)
    with attach(model, head) as attachment:
        assert attachment.min_p == 0.1
    for wrong in (float("nan"), 2, "0.1"):
        with pytest.raises(ValueError, match="min_p"):
            attach(model, head, min_p=wrong)


def test_a_prompt_with_a_seed_of_its_own_is_the_same_in_any_batch():
    model, ids = tiny_model("llama"), prompts(3)
    with attach(model, tiny_head(model)):

        def run(ids, **noise):
            return model.generate(ids, max_new_tokens=8, **noise)

        together = run(ids, seed=[5, 6, 7])
        for row in range(3):
            assert torch.equal(run(ids[row : row + 1], seed=[5 + row])[0], together[row])
        several = run(ids, seed=torch.tensor([5, 6, 7]), num_return_sequences=4)
        assert torch.equal(several[::4], together)
        assert len(several[:4].unique(dim=0)) > 1
        assert torch.equal(run(ids[1:2], seed=[6], num_return_sequences=4), several[4:8])
        # Under one seed a row's noise is its number's, or that of a stream given.
        assert torch.equal(run(ids[1:2], seed=5, stream=1)[0], run(ids, seed=5)[1])
        assert torch.equal(run(ids, seed=5, stream=[0, 1, 2]), run(ids, seed=5))


@pytest.mark.parametrize(
    "noise",
    [
        *({"seed": seed} for seed in ([1, 2], 1.5, "x", 2**64, True, [[1, 2, 3]])),
        *({"seed": 1, "stream": stream} for stream in ([0, 1], -1, 0.5)),
    ],
    ids=str,
)
@both_paths
def test_wrong_seeds_and_streams_are_refused(noise, fused):
    model, ids = tiny_model("llama"), prompts(3)
    with (
        attach(model, tiny_head(model), fused=fused),
        pytest.raises(ValueError, match=r"seed|stream"),
    ):
        model.generate(ids, max_new_tokens=2, **noise)


@both_paths
def test_records_are_of_the_temperature_that_was_used(fused):
    """The policy's times that of the call."""
    model, ids = tiny_model("llama"), prompts(2)
    with attach(model, tiny_head(model), fused=fused, record=True) as attached:
        model.generate(ids, max_new_tokens=1, seed=3)
        (own,) = attached.records
        model.generate(ids, max_new_tokens=1, seed=3, temperature=0.5)
        (halved,) = attached.records
        assert torch.equal(halved.temperature, 0.5 * own.temperature)
        model.generate(ids, max_new_tokens=1, generation_config=GenerationConfig(temperature=2.0))
        assert torch.equal(attached.records[0].temperature, 2.0 * own.temperature)


def test_arguments_are_the_same_by_position():
    model, draft, ids = tiny_model("llama"), tiny_model("qwen3"), prompts(1)
    config = GenerationConfig(max_new_tokens=8)
    between = [None] * 4  # logits_processor … synced_gpus
    with attach(model, tiny_head(model), min_p=0.2):
        want = model.generate(ids, generation_config=config, assistant_model=draft, seed=5)
        got = model.generate(ids, config, *between, draft, seed=5)
        assert torch.equal(got, want)
        with pytest.raises(ValueError, match="custom_generate cannot be used"):
            model.generate(ids, config, *between, None, None, None, None, lambda *_, **__: None)
        with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
            model.generate(ids, config, generation_config=config)


def test_a_generate_of_any_arguments_is_adaptive_too():
    """As that of some models of transformers is."""
    model, ids = tiny_model("llama"), prompts(1)

    class Wrapped(type(model)):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    class Led(type(model)):
        def generate(self, inputs, *args, **kwargs):
            return super().generate(inputs, *args, **kwargs)

    config = GenerationConfig(max_new_tokens=6)
    for kind in (Wrapped, Led):
        model.__class__ = kind
        with attach(model, tiny_head(model), record=True) as attached:
            want = model.generate(inputs=ids, max_new_tokens=6, seed=5)
            for args, more in (((ids,), {"max_new_tokens": 6}), ((ids, config), {})):
                assert torch.equal(model.generate(*args, **more, seed=5), want)
                assert len(attached.records) == 6


def test_a_seed_leaves_torchs_generator_as_it_was():
    model, ids = tiny_model("llama"), prompts(2)
    with attach(model, tiny_head(model), fused=False):
        torch.manual_seed(1)
        want = torch.rand(3)
        torch.manual_seed(1)
        a = model.generate(ids, max_new_tokens=4, seed=3)
        assert torch.equal(torch.rand(3), want)
        assert torch.equal(model.generate(ids, max_new_tokens=4, seed=3), a)


def test_seeds_are_one_a_prompt_whatever_it_returns():
    model, ids = tiny_model("llama"), prompts(1)
    words = r"a list of 1, one a prompt, which its returned sequences share; got shape \(3,\)$"
    with attach(model, tiny_head(model)), pytest.raises(ValueError, match=words):
        model.generate(ids, max_new_tokens=2, num_return_sequences=3, seed=[0, 1, 2])


@pytest.mark.parametrize(
    "asked", [{"output_scores": True, "return_dict_in_generate": True}, {"top_k": 5}]
)
def test_seeds_a_prompt_need_the_fused_sampler(asked):
    model, ids = tiny_model("llama"), prompts(3)
    with attach(model, tiny_head(model)), pytest.raises(ValueError, match="fused sampler"):
        model.generate(ids, max_new_tokens=2, seed=[1, 2, 3], **asked)


@every_model
def test_a_prompt_of_embeddings_draws_as_its_ids(name):
    model, ids = tiny_model(name), prompts(2)
    embeddings = model.get_input_embeddings()(ids)
    with attach(model, tiny_head(model)):
        want = model.generate(ids, max_new_tokens=6, seed=3)[:, 5:]
        assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=6, seed=3), want)
        padded = torch.cat([torch.zeros_like(embeddings[:, :2]), embeddings], 1)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[:, :2] = 0
        got = model.generate(inputs_embeds=padded, attention_mask=mask, max_new_tokens=6, seed=3)
        assert torch.equal(got, want)


@both_paths
@pytest.mark.parametrize("broken", ["a NaN", "everything masked", "a head of NaN"])
def test_rows_that_cannot_be_sampled_raise(fused, broken):
    model, ids = tiny_model("llama"), prompts(3)
    head = tiny_head(model)

    def spoil(input_ids, scores):
        scores = scores.clone()
        scores[1] = float("nan") if broken == "a NaN" else float("-inf")
        return scores

    processors = [spoil]
    if broken == "a head of NaN":
        processors = []
        with torch.no_grad():
            head.mlp[2].bias.fill_(float("nan"))
    with attach(model, head, fused=fused), pytest.raises(RuntimeError) as error:
        model.generate(ids, max_new_tokens=3, seed=0, logits_processor=processors)
    if fused:
        assert "row 1" in str(error.value) or broken == "a head of NaN"


def test_nan_without_logits_raises():
    model, ids = tiny_model("llama"), prompts(2)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with attach(model, tiny_head(model)) as attachment:
        assert attachment.lazy
        with pytest.raises(RuntimeError, match=r"row 0.*NaN"):
            model.generate(ids, max_new_tokens=3, seed=0)
