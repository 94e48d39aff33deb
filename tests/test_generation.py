"""Adaptive `generate` on tiny random models of five architectures."""

import threading

import pytest
import torch
import transformers as hf
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GenerationConfig

from autodeco_fast import TemperatureHead, attach

V = 61
_COMMON = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_COMMON |= dict(num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0)
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_COMMON),
    "qwen3": lambda: hf.Qwen3Config(**_COMMON, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**_COMMON, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"),
    "granite": lambda: hf.GraniteConfig(**_COMMON, logits_scaling=2.0),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=V, n_embd=36, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, tie_word_embeddings=False
    ),
}
PROMPT = torch.tensor([[5, 9, 3, 17]])


def make(name: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    model.get_output_embeddings().weight.data.normal_(0, 0.25)
    head = TemperatureHead(model.get_output_embeddings().in_features, 16)
    torch.nn.init.normal_(head.mlp[2].weight, std=1.0)
    return model, head


@pytest.fixture(params=CONFIGS)
def pair(request):
    return make(request.param)


def adaptive_logits(model, head, ids):
    """z/T by hand, in the plain model."""
    kept = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    with torch.no_grad():
        z = model(ids).logits
    hook.remove()
    with torch.no_grad():
        return z.float() / head(kept[0])[..., None]


def test_scaled_logits_are_z_over_t(pair):
    model, head = pair
    want = adaptive_logits(model, head, PROMPT)[:, -1]
    with attach(model, head):
        options = dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        got = model.generate(PROMPT, **options).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_detaching_restores_bit_for_bit(pair, tmp_path):
    model, head = pair
    before, kind = model(PROMPT).logits, type(model)
    greedy = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    with attach(model, head):
        assert torch.equal(model(PROMPT).logits, before)  # scoring is not scaled
        model.generate(PROMPT, max_new_tokens=4)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), greedy)
        model.save_pretrained(tmp_path)
    assert type(model) is kind
    assert torch.equal(model(PROMPT).logits, before)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), greedy)
    assert hf.AutoConfig.from_pretrained(tmp_path).architectures == [kind.__name__]


def test_seed_fixes_the_output(pair):
    model, head = pair
    with attach(model, head, min_p=0.01):
        for options in ({}, {"top_k": 30}):
            a = model.generate(PROMPT, max_new_tokens=12, seed=3, **options)
            assert torch.equal(a, model.generate(PROMPT, max_new_tokens=12, seed=3, **options))
            assert not torch.equal(a, model.generate(PROMPT, max_new_tokens=12, seed=4, **options))
        torch.manual_seed(0)
        a = model.generate(PROMPT, max_new_tokens=12)
        b = model.generate(PROMPT, max_new_tokens=12)
        torch.manual_seed(0)
        assert torch.equal(a, model.generate(PROMPT, max_new_tokens=12))
        assert not torch.equal(a, b)


def p_value(model, head, min_p: float, fused: bool, believed_scale: float = 1.0) -> float:
    """Chi-square of 20,000 first tokens against softmax(z/T) cut at Min-P."""
    z = adaptive_logits(model, head, PROMPT)[0, -1].double() * believed_scale
    p = z.softmax(-1)
    p = torch.where(p >= min_p * p.max(), p, 0.0)
    p /= p.sum()
    with attach(model, head, min_p=min_p, fused=fused):
        out = model.generate(PROMPT.expand(100, -1), max_new_tokens=1, num_return_sequences=200, seed=11)
    counts = torch.bincount(out[:, -1], minlength=V).double()
    if counts[p == 0].any():
        return 0.0
    kept = p > 0
    return float(chisquare(counts[kept], p[kept] * counts.sum()).pvalue)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_tokens_follow_the_cut_distribution(name, fused):
    model, head = make(name)
    assert p_value(model, head, 0.1, fused) > 1e-4
    assert p_value(model, head, 0.1, fused, believed_scale=1.15) < 1e-4  # the test sees a temperature 15 % off


def test_model_defaults_do_not_stack():
    model, head = make()
    model.generation_config.update(top_k=2, temperature=0.1, top_p=0.1, do_sample=True)
    with attach(model, head, min_p=1e-6):
        for options in ({}, {"output_scores": True, "return_dict_in_generate": True}):
            out = model.generate(PROMPT, max_new_tokens=1, num_return_sequences=300, seed=0, **options)
            assert len(set((out.sequences if options else out)[:, -1].tolist())) > 10
        out = model.generate(PROMPT, max_new_tokens=1, num_return_sequences=300, seed=0, top_k=2)
        assert len(set(out[:, -1].tolist())) == 2  # given in the call, it counts


def test_left_padding_does_not_change_the_tokens(pair):
    model, head = pair
    with attach(model, head):
        alone = model.generate(PROMPT, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1)
        batch = torch.cat([padded, torch.arange(1, 8)[None]])
        mask = torch.ones_like(batch)
        mask[0, :3] = 0
        options = dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        both = model.generate(batch, attention_mask=mask, **options).logits[0]
        assert model.generate(batch, attention_mask=mask, max_new_tokens=5).shape == (2, 12)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)


def test_static_cache_and_prompt_lookup(pair):
    model, head = pair
    with attach(model, head):
        dynamic = model.generate(PROMPT, max_new_tokens=10, seed=1)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=10, seed=1, cache_implementation="static"), dynamic)
        assert model.generate(PROMPT.repeat(1, 3), max_new_tokens=10, prompt_lookup_num_tokens=3).shape == (1, 22)


class Collector:
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


def test_streamer_processors_and_generation_config():
    model, head = make()
    with attach(model, head):
        streamer = Collector()
        config = GenerationConfig(max_new_tokens=6, bad_words_ids=[[7]])
        out = model.generate(PROMPT, config, streamer=streamer, seed=2)
        assert streamer.seen == [*out[0].tolist(), "end"]
        many = model.generate(PROMPT, config, num_return_sequences=200, seed=2)
        assert not (many[:, 4:] == 7).any()


def test_two_threads(pair):
    model, head = pair
    prompts = [PROMPT, PROMPT.flip(1)]
    with attach(model, head):
        alone = [model.generate(p, max_new_tokens=12, seed=5) for p in prompts]
        out = [None, None]

        def work(i):
            out[i] = model.generate(prompts[i], max_new_tokens=12, seed=5)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, out))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"guidance_scale": 2.0}, {"penalty_alpha": 0.6}, {"sequence_bias": {(3,): 2.0}},
     {"custom_generate": lambda *a, **k: None}],
)  # fmt: skip
def test_refuses_what_it_cannot_honour(options):
    model, head = make()
    with attach(model, head), pytest.raises(ValueError, match="cannot be combined with a predicted temperature"):
        model.generate(PROMPT, max_new_tokens=2, **options)


def test_says_what_is_wrong():
    model, head = make()
    with pytest.raises(ValueError, match="head has width 8, the model's output embedding takes 32"):
        attach(model, TemperatureHead(8))
    with pytest.raises(ValueError, match=r"min_p must be in \(0, 1\], got 0"):
        attach(model, head, min_p=0)
    attachment = attach(model, head)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, head)
    with pytest.raises(ValueError, match="generate_batch is not adaptive"):
        model.generate_batch([[1, 2]])
    attachment.detach()
    attachment.detach()
