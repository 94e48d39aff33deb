"""`generate` of AutoDeco checkpoints: both heads, drawn by hand beside it."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import pipeline

from autodeco_fast import AutoDecoModelForCausalLM, TopPHead, attach, detach, sample
from autodeco_fast.policies import AutoDecoPolicy
from tests.autodeco_checkpoints import HIDDEN, base_model, head_tensors, predicted
from tests.tiny_models import hidden_and_logits, prompts, tokenizer_of_characters

load = AutoDecoModelForCausalLM.from_pretrained


@pytest.fixture
def model(checkpoint):
    return load(checkpoint("llama"))


def continued(base, tensors: dict, ids: torch.Tensor, steps: int, seed: int, **cuts):
    """Tokens drawn by hand at the predicted T and top-p, one forward of the whole text a token."""
    start = ids.shape[1]
    for position in range(start, start + steps):
        h, z = hidden_and_logits(base, ids)
        T, P = predicted(tensors, h, z)
        options = {"temperature": T, "top_p": P, **cuts}
        token = sample(z, seed=seed, position=position, **options).token
        ids = torch.cat([ids, token[:, None]], 1)
    return ids


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_tokens_are_those_drawn_by_hand_at_the_predicted_values(checkpoint, family):
    model, ids = load(checkpoint(family, "merged")), prompts(3)
    got = model.generate(ids, max_new_tokens=4, seed=7)
    assert torch.equal(got, continued(base_model(family), head_tensors(), ids, 4, 7))
    cut = model.generate(ids, max_new_tokens=4, seed=7, min_p=0.3)
    expected = continued(base_model(family), head_tensors(), ids, 4, 7, min_p=0.3)
    assert torch.equal(cut, expected)
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy, base_model(family).generate(ids, max_new_tokens=4, do_sample=False))


def test_generation_is_that_of_the_base_with_the_heads_attached(model):
    base, ids = base_model("llama"), prompts(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding on the left
    tokenizer = tokenizer_of_characters()
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_return_sequences": 2}
    options |= {"seed": [3, 5], "stop_strings": ["a", "b", "c", "d"], "tokenizer": tokenizer}
    with attach(base, model.temp_head, top_p_head=model.top_p_head):
        expected = base.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)

    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append(tokens.flatten())

        def end(self):
            self.seen = torch.cat(self.seen)

    streamer = Streamer()
    text = model.generate(ids[1:], max_new_tokens=5, seed=1, streamer=streamer)
    assert torch.equal(streamer.seen, text[0])


def test_one_head_generates_without_the_other(checkpoint):
    ids, base, tensors = prompts(3), base_model("llama"), head_tensors()
    h, z = hidden_and_logits(base, ids)
    T, _ = predicted(tensors, h, z)
    model = load(checkpoint("llama"), enable_top_p_head=False)
    token = model.generate(ids, max_new_tokens=1, seed=2)[:, -1]
    assert torch.equal(token, sample(z, T, seed=2, position=5).token)
    model = load(checkpoint("llama"), enable_temperature_head=False)
    top_p = model(ids).top_p_logits[:, -1, 0]
    token = model.generate(ids, max_new_tokens=1, seed=2)[:, -1]
    assert torch.equal(token, sample(z, 1.0, top_p=top_p, seed=2, position=5).token)


def test_heads_are_attached_once_and_anew_when_they_change(model):
    forwards = []
    model.llm.register_forward_hook(lambda *_: forwards.append(1))
    first = model.generate(prompts(), max_new_tokens=2, seed=1)
    assert len(forwards) == 3  # one to try
    again = model.generate(prompts(), max_new_tokens=2, seed=1)
    assert len(forwards) == 5
    assert torch.equal(first, again)
    logits = model(prompts()).logits  # not scaled
    assert torch.equal(logits, base_model("llama")(prompts()).logits)

    model.top_p_head = TopPHead(HIDDEN)
    torch.nn.init.constant_(model.top_p_head.mlp[2].bias, -30.0)  # keeps one token
    greedy = model.generate(prompts(), max_new_tokens=2, do_sample=False)
    assert torch.equal(model.generate(prompts(), max_new_tokens=2, seed=1), greedy)
    model.resize_token_embeddings(100)
    assert model.generate(prompts(), max_new_tokens=2, seed=1).shape == (2, 7)
    detach(model.llm)
    assert torch.equal(model.generate(prompts(), max_new_tokens=2, seed=1), greedy)


def test_other_policies_are_attached_to_the_base(model):
    with pytest.raises(ValueError, match=r"attach to its base, model\.llm"):
        attach(model, model.temp_head)
    attached = attach(model.llm, model.temp_head, min_p=0.5)
    with pytest.raises(ValueError, match="a policy is attached to this model already"):
        model.generate(prompts(), max_new_tokens=1)
    attached.detach()
    model.generate(prompts(), max_new_tokens=1)


def test_copies_and_pickles_of_a_model_that_has_generated(model):
    expected = model.generate(prompts(), max_new_tokens=3, seed=1)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not hasattr(type(copied.llm), "_autodeco_attachment")
        assert torch.equal(copied.generate(prompts(), max_new_tokens=3, seed=1), expected)
        with torch.no_grad():
            copied.temp_head.mlp[2].bias.fill_(-30.0)  # greedy
    assert torch.equal(model.generate(prompts(), max_new_tokens=3, seed=1), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_compiled_model_runs_its_own_weights(model, how):
    model.compile(backend="eager")
    got = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    torch.nn.init.zeros_(got.llm.lm_head.weight)
    assert not got(prompts()).logits.any()


def test_threads_may_generate_at_once(model):
    ids, got = prompts(), {}
    expected = [copy.deepcopy(model).generate(ids, max_new_tokens=6, seed=s) for s in range(3)]

    def run(seed: int):
        got[seed] = model.generate(ids, max_new_tokens=6, seed=seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], expected[seed]) for seed in range(3))


def test_a_pipeline_brings_no_settings_of_its_own(model):
    tokenizer = tokenizer_of_characters()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    got = pipe("hello", max_new_tokens=5, seed=3, return_full_text=False)[0]["generated_text"]
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, seed=3)[0, ids.shape[1] :]
    assert got == tokenizer.decode(expected, skip_special_tokens=True)


def test_its_heads_are_neither_replaced_nor_taken_off(model):
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    for call in (lambda: attach(model, model.temp_head), lambda: detach(model)):
        with pytest.raises(ValueError, match=r"its own heads.*model\.llm"):
            call()


def test_a_forward_predicts_what_generate_draws_with(model):
    """A top-p that fp32 would round to 0, which no sampler takes, too."""
    ids = prompts(3)
    torch.nn.init.constant_(model.top_p_head.mlp[2].bias, -200.0)
    output, policy = model(ids), AutoDecoPolicy(head=model.temp_head, top_p_head=model.top_p_head)
    picked = policy.pick(*hidden_and_logits(model.llm, ids))
    torch.testing.assert_close(output.temp_logits[:, -1, 0], picked.temperature)
    assert torch.equal(output.top_p_logits[:, -1, 0], picked.top_p)
    assert picked.top_p.min() > 0
