"""`attach` on five kinds of logits: what is drawn, what else works, what is refused, what detaching leaves."""

import json
import threading

import pytest
import torch
from scipy.stats import chi2
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from autodeco_fast import TemperatureHead, attach
from tests.tiny_models import NAMES, VOCAB, tiny_head, tiny_model

every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<pad>", "<s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *map(chr, range(33, 33 + VOCAB - 3))])}
    raw = Tokenizer(BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


def prompts(rows: int = 2, length: int = 5, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


@torch.no_grad()
def logits_and_temperature(model, head, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last position's logits `[B, V]` and T `[B]` in fp64, by hand from a plain forward."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = model(ids).logits[:, -1].double()
    handle.remove()
    h = seen[0][:, -1].double()
    first, _, last = head.mlp
    hidden = torch.relu(h @ first.weight.double().T + first.bias.double())
    T = 2 * torch.sigmoid(hidden @ last.weight.double().T + last.bias.double()).squeeze(-1)
    return z, T


def undecided_prompt(model, head) -> torch.Tensor:
    """The prompt `[1, 5]`, of 64, whose cut at Min-P 0.1 keeps closest to 12 tokens."""
    ids = prompts(64)
    z, T = logits_and_temperature(model, head, ids)
    kept = (min_p_distribution(z, T[:, None], 0.1) > 0).sum(-1)
    return ids[(kept - 12).abs().argmin()][None]


def min_p_distribution(z: torch.Tensor, T: torch.Tensor | float, min_p: float) -> torch.Tensor:
    """softmax(z/T) cut at Min-P and renormalised, fp64."""
    p = (z / T).softmax(-1)
    p = p * (p >= min_p * p.max(-1, keepdim=True).values)
    return p / p.sum(-1, keepdim=True)


def chi_square(tokens: torch.Tensor, p: torch.Tensor) -> float:
    """The p-value of draws `[N]` under `p [V]`, bins under 10 expected draws pooled; 0 if one has probability 0."""
    counts, expected = torch.bincount(tokens, minlength=len(p)).double(), p * len(tokens)
    if counts[p == 0].any():
        return 0.0
    small = expected < 10
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))


def draws(model, ids: torch.Tensor, n: int = 6000, **kwargs) -> torch.Tensor:
    return model.generate(ids, num_return_sequences=n, max_new_tokens=1, **kwargs)[:, -1]


# What is drawn


@every_model
def test_scores_are_the_logits_over_the_temperature(name):
    model, ids = tiny_model(name), prompts(3)
    head = tiny_head(model)
    z, T = logits_and_temperature(model, head, ids)
    assert T.max() > 1.3 * T.min()
    with attach(model, head, min_p=0.0):
        out = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, output_logits=True)
    want = (z / T[:, None]).softmax(-1)
    for got in (out.scores[0], out.logits[0]):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.softmax(-1).double(), want, rtol=2e-5, atol=1e-7)


@every_model
@pytest.mark.parametrize("fused", [True, False])
def test_tokens_follow_the_cut_softmax(name, fused):
    model = tiny_model(name)
    head = tiny_head(model)
    ids = undecided_prompt(model, head)
    z, T = logits_and_temperature(model, head, ids)
    p = min_p_distribution(z[0], T[0], 0.1)
    assert 6 < (p > 0).sum() < 24
    with attach(model, head, min_p=0.1, fused=fused):
        tokens = draws(model, ids, seed=11)
    assert chi_square(tokens, p) > 1e-3
    assert chi_square(tokens, min_p_distribution(z[0], T[0] * 1.25, 0.1)) < 1e-6  # the test can tell
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
    own = {"temperature": 0.1, "top_k": 2, "top_p": 0.3, "min_p": 0.9, "typical_p": 0.3, "epsilon_cutoff": 0.1}
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, **own)
    with attach(model, head):
        assert torch.equal(model.generate(ids, max_new_tokens=6, seed=5), want)
        config = GenerationConfig(max_new_tokens=6)
        assert torch.equal(model.generate(ids, generation_config=config, seed=5), want)
        unfused = model.generate(ids, generation_config=config, return_dict_in_generate=True, output_scores=True, seed=5)
    z, T = logits_and_temperature(model, head, ids)
    assert torch.equal(unfused.scores[0].isfinite(), min_p_distribution(z, T[:, None], 0.1) > 0)
    assert config.do_sample is None  # the caller's object is left alone


def test_the_default_top_k_does_not_stack():
    model, ids = tiny_model("gemma2"), prompts(1)
    with attach(model, tiny_head(model), min_p=0.0, fused=False):
        assert len(draws(model, ids, 4000).unique()) > 60


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
            ({"generation_config": GenerationConfig(temperature=2.0)}, min_p_distribution(z[0], 2 * T[0], 0.3)),
        ]:
            assert chi_square(draws(model, ids, seed=2, **kwargs), want) > 1e-3
        best = set(z[0].topk(2).indices.tolist())
        assert set(draws(model, ids, 500, top_k=2, min_p=0.0).tolist()) == best


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


# The rest of generate


@every_model
def test_left_padding_changes_nothing(name):
    model, ids = tiny_model(name), prompts(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, prompts(1, 9, seed=2)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    with attach(model, tiny_head(model)):
        alone = model.generate(ids, max_new_tokens=10, seed=8)
        together = model.generate(batch, attention_mask=mask, max_new_tokens=10, seed=8)
    assert torch.equal(alone[0, 6:], together[0, 9:])


@every_model
@pytest.mark.parametrize("fused", [True, False])
def test_static_cache(name, fused):
    model, ids = tiny_model(name), prompts()
    with attach(model, tiny_head(model), fused=fused):
        want = model.generate(ids, max_new_tokens=8, seed=3)
        assert torch.equal(model.generate(ids, max_new_tokens=8, seed=3, cache_implementation="static"), want)


@every_model
def test_compiled_forward(name):
    """The whole forward, hooks and gate included, is one graph; the gate is re-read on every call."""
    torch._dynamo.reset()
    model, ids = tiny_model(name), prompts()
    head = tiny_head(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(ids, use_cache=False).logits
    with attach(model, head) as attachment:
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)
        with attachment.gate.entered(None):
            scaled = compiled(ids, use_cache=False).logits
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)
    _, T = logits_and_temperature(model, head, ids)
    torch.testing.assert_close(scaled[:, -1], (plain[:, -1] / T[:, None]).float(), rtol=2e-5, atol=1e-6)
    with attach(model, tiny_head(model, seed=9)) as attachment, attachment.gate.entered(None):
        assert not torch.allclose(compiled(ids, use_cache=False).logits, scaled)
    assert torch.equal(compiled(ids, use_cache=False).logits, plain)


def check_scores(model, head, out, start: int) -> None:
    """Every step's scores are its logits over its temperature, cut at Min-P 0.1, and its token is among them."""
    assert len(out.scores) == out.sequences.shape[1] - start
    for i, scores in enumerate(out.scores):
        z, T = logits_and_temperature(model, head, out.sequences[:, : start + i])
        want = min_p_distribution(z, T[:, None], 0.1)
        torch.testing.assert_close(scores.softmax(-1).double(), want, rtol=1e-4, atol=1e-6)
        assert (want.gather(1, out.sequences[:, start + i, None]) > 0).all()


@every_model
def test_prompt_lookup(name):
    """Candidates of several tokens a forward: every position gets the temperature of its own hidden state."""
    model, ids = tiny_model(name), prompts(1, 4).repeat(1, 3)
    head = tiny_head(model)
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 8}
    with attach(model, head) as attachment:
        out = model.generate(ids, prompt_lookup_num_tokens=3, seed=5, **asked)
        fused = model.generate(ids, prompt_lookup_num_tokens=3, seed=5, max_new_tokens=8)
        assert not attachment.gate.open
    assert torch.equal(out.sequences, fused)
    check_scores(model, head, out, 12)


def test_assisted_decoding():
    model, assistant, ids = tiny_model("llama"), tiny_model("qwen3"), prompts(1)
    head = tiny_head(model)
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6}
    with attach(model, head):
        out = model.generate(ids, assistant_model=assistant, seed=5, **asked)
    check_scores(model, head, out, 5)


@every_model
def test_streamer(name, tokenizer):
    model, ids = tiny_model(name), prompts(1)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with attach(model, tiny_head(model)):
        want = model.generate(ids, max_new_tokens=8, seed=6)
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs={"max_new_tokens": 8, "seed": 6, "streamer": streamer}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(want[0, 5:], clean_up_tokenization_spaces=False)


@every_model
def test_stop_strings(name, tokenizer):
    model, ids = tiny_model(name), prompts(1)
    with attach(model, tiny_head(model)):
        free = model.generate(ids, max_new_tokens=10, seed=7)
        stop = tokenizer.decode(free[0, 8:9])
        got = model.generate(ids, max_new_tokens=10, seed=7, stop_strings=[stop], tokenizer=tokenizer)
    assert 5 < got.shape[1] < free.shape[1]
    assert torch.equal(got[0], free[0, : got.shape[1]])


@every_model
def test_pipeline(name, tokenizer):
    """The pipeline's own temperature of 0.7 does not stack on the predicted one, one given to it does."""
    model = tiny_model(name)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    ids = tokenizer("abc", return_tensors="pt").input_ids
    with attach(model, tiny_head(model), min_p=0.05):
        want = model.generate(ids, max_new_tokens=8, seed=21)
        got = pipe("abc", max_new_tokens=8, seed=21, return_tensors=True)[0]["generated_token_ids"]
        assert list(got) == want[0].tolist()
        colder = pipe("abc", max_new_tokens=8, temperature=1e-5, return_tensors=True)[0]["generated_token_ids"]
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert list(colder) == greedy[0].tolist()


@every_model
def test_num_return_sequences_are_draws_of_their_own(name):
    model, ids = tiny_model(name), prompts(1)
    with attach(model, tiny_head(model)):
        out = model.generate(ids, num_return_sequences=6, max_new_tokens=10, seed=1)
    assert len(out.unique(dim=0)) == 6


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_two_threads(name):
    model = tiny_model(name)
    jobs = [(prompts(2, 5 + k, seed=k), k) for k in range(2)]
    with attach(model, tiny_head(model)):
        want = [model.generate(ids, max_new_tokens=24, seed=k) for ids, k in jobs]
        plain = model(jobs[0][0]).logits
        for _ in range(3):
            got, scored = [None, None], []
            barrier = threading.Barrier(3)

            def work(k, got=got, barrier=barrier):
                barrier.wait()
                got[k] = model.generate(jobs[k][0], max_new_tokens=24, seed=k)

            def score(scored=scored, barrier=barrier):
                barrier.wait()
                scored.extend(model(jobs[0][0]).logits for _ in range(10))

            threads = [threading.Thread(target=work, args=(k,)) for k in range(2)] + [threading.Thread(target=score)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(torch.equal(a, b) for a, b in zip(got, want))
            assert len(scored) == 10
            assert all(torch.equal(z, plain) for z in scored)


def test_processors_see_scaled_logits_and_keep_their_say():
    model, ids = tiny_model("llama"), prompts(1)
    with attach(model, tiny_head(model)):
        free = draws(model, ids, 200, seed=1)
        banned = int(free.mode().values)
        tokens = draws(model, ids, 200, seed=1, suppress_tokens=[banned])
    assert banned not in tokens
    assert torch.equal(tokens[free != banned], free[free != banned])


def test_bfloat16_models_and_heads():
    model, ids = tiny_model("llama").to(torch.bfloat16), prompts()
    for dtype in (torch.float32, torch.bfloat16):
        with attach(model, tiny_head(model).to(dtype)):
            out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_scores=True, output_logits=True)
            assert out.logits[0].dtype == torch.float32
            assert model.generate(ids, max_new_tokens=3).shape == (2, 8)


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
        return model.generate(ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **sampled)

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
