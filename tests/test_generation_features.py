"""What else `generate` does while attached: caches, compilation, speculation, streams, threads."""

import threading

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from autodeco_fast import attach
from tests.tiny_models import (
    NEVER,
    both_paths,
    every_model,
    first_tokens,
    logits_and_temperature,
    min_p_distribution,
    of_one_layer,
    prompts,
    tiny_head,
    tiny_model,
    tokenizer_of_characters,
)

EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_characters()


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
@both_paths
def test_static_cache(name, fused):
    model, ids = tiny_model(name), prompts()
    asked = {"max_new_tokens": 8, "seed": 3}
    with attach(model, tiny_head(model), fused=fused):
        want = model.generate(ids, **asked)
        assert torch.equal(model.generate(ids, **asked, cache_implementation="static"), want)


@pytest.mark.slow
@every_model
def test_compiled_forward(name):
    """The forward, hooks and gate included, is one graph that reads the gate on every call."""
    torch._dynamo.reset()
    model, ids = of_one_layer(name), prompts()
    head = tiny_head(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(ids, use_cache=False).logits
    with attach(model, head) as attachment:
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)
        with attachment.gate.opened():
            scaled = compiled(ids, use_cache=False).logits
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)
    _, T = logits_and_temperature(model, head, ids)
    torch.testing.assert_close(
        scaled[:, -1], (plain[:, -1] / T[:, None]).float(), rtol=2e-5, atol=1e-6
    )
    with attach(model, tiny_head(model, seed=9)) as attachment, attachment.gate.opened():
        assert not torch.allclose(compiled(ids, use_cache=False).logits, scaled)
    assert torch.equal(compiled(ids, use_cache=False).logits, plain)


def check_scores(model, head, out, start: int) -> None:
    """Every step's scores are its logits over its T, cut at Min-P 0.1; its token is among them."""
    assert len(out.scores) == out.sequences.shape[1] - start
    for i, scores in enumerate(out.scores):
        z, T = logits_and_temperature(model, head, out.sequences[:, : start + i])
        want = min_p_distribution(z, T[:, None], 0.1)
        torch.testing.assert_close(scores.softmax(-1).double(), want, rtol=1e-4, atol=1e-6)
        assert (want.gather(1, out.sequences[:, start + i, None]) > 0).all()


@every_model
def test_prompt_lookup(name):
    """Candidates of several tokens a forward: every position gets its own hidden state's T."""
    model, ids = tiny_model(name), prompts(1, 4).repeat(1, 3)
    head = tiny_head(model)
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 8}
    with attach(model, head) as attachment:
        lookup = {"prompt_lookup_num_tokens": 3, "eos_token_id": NEVER, "seed": 5}
        out = model.generate(ids, **lookup, **asked)
        fused = model.generate(ids, **lookup, max_new_tokens=8)
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
            target=model.generate,
            args=(ids,),
            kwargs={"max_new_tokens": 8, "seed": 6, "streamer": streamer},
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
        got = model.generate(
            ids, max_new_tokens=10, seed=7, stop_strings=[stop], tokenizer=tokenizer
        )
    assert 5 < got.shape[1] < free.shape[1]
    assert torch.equal(got[0], free[0, : got.shape[1]])


@every_model
def test_pipeline(name, tokenizer):
    """The pipeline's temperature of 0.7 does not stack on the predicted one, a given one does."""
    model = tiny_model(name)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    ids = tokenizer("abc", return_tensors="pt").input_ids
    with attach(model, tiny_head(model), min_p=0.05):
        want = model.generate(ids, max_new_tokens=8, seed=21)
        got = pipe("abc", max_new_tokens=8, seed=21, return_tensors=True)[0]["generated_token_ids"]
        assert list(got) == want[0].tolist()
        # Of a configuration it makes a copy, and fills its temperature in.
        config = GenerationConfig(max_new_tokens=8)
        got = pipe("abc", generation_config=config, seed=21, return_tensors=True)
        assert list(got[0]["generated_token_ids"]) == want[0].tolist()
        chosen = GenerationConfig(max_new_tokens=8, temperature=1e-5)
        (coldest,) = pipe("abc", generation_config=chosen, return_tensors=True)
        (colder,) = pipe("abc", max_new_tokens=8, temperature=1e-5, return_tensors=True)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert list(colder["generated_token_ids"]) == greedy[0].tolist()
    assert coldest == colder


@every_model
def test_num_return_sequences_differ(name):
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

            threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
            threads.append(threading.Thread(target=score))
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
        free = first_tokens(model, ids, 200, seed=1)
        banned = int(free.mode().values)
        tokens = first_tokens(model, ids, 200, seed=1, suppress_tokens=[banned])
    assert banned not in tokens
    assert torch.equal(tokens[free != banned], free[free != banned])


def test_bfloat16_models_and_heads():
    model, ids = tiny_model("llama").to(torch.bfloat16), prompts()
    for dtype in (torch.float32, torch.bfloat16):
        with attach(model, tiny_head(model).to(dtype)):
            out = model.generate(ids, max_new_tokens=2, **EVERYTHING)
            assert out.logits[0].dtype == torch.float32
            assert model.generate(ids, max_new_tokens=3).shape == (2, 8)


def test_a_prompt_of_embeddings():
    """No ids to begin with, on a model never tried before."""
    model = tiny_model("llama")
    head, embeddings = tiny_head(model), model.get_input_embeddings()(prompts())
    with attach(model, head):
        first = model.generate(inputs_embeds=embeddings, max_new_tokens=5, seed=1)
        again = model.generate(inputs_embeds=embeddings, max_new_tokens=5, seed=1)
    assert first.shape == (len(embeddings), 5)
    assert torch.equal(first, again)
