"""AutoDeco's two heads in sampling: T and top-p a row, by hand and in `generate`."""

import threading
from functools import partial

import pytest
import torch
from transformers import LogitsProcessor, TextIteratorStreamer, pipeline

from autodeco_fast import HeadPolicy, TemperatureHead, TopPHead, attach
from autodeco_fast.generation.gate import Call
from autodeco_fast.policies import AutoDecoPolicy, base, parse
from tests import on_device
from tests.reference.autodeco import joint_features
from tests.reference.sampling import assert_same_tokens, kept_set, reference
from tests.tiny_models import (
    NAMES,
    NEVER,
    hidden_and_logits,
    of_one_layer,
    prompts,
    tiny_head,
    tiny_model,
    tiny_top_p_head,
    tokenizer_of_characters,
)

EVERYTHING = {"return_dict_in_generate": True, "output_scores": True}
STEPS = 5


def temperature_by_hand(head: TemperatureHead, h: torch.Tensor) -> torch.Tensor:
    first, _, last = head.mlp
    inside = torch.relu(h @ first.weight.double().T + first.bias.double())
    return 2 * torch.sigmoid(inside @ last.weight.double().T + last.bias.double())[:, 0]


def top_p_by_hand(head: TopPHead, h: torch.Tensor, z: torch.Tensor, T: torch.Tensor):
    """Top-p `[B]` of fp64 hidden states, logits and temperatures."""
    columns = [T, *(joint_features(z, T) if head.use_enhanced_features else [])]
    inputs = torch.cat([h, torch.stack(columns, -1)], -1)
    first, _, last = head.mlp
    inside = torch.relu(inputs @ first.weight.double().T + first.bias.double())
    return torch.sigmoid(inside @ last.weight.double().T + last.bias.double())[:, 0]


@torch.no_grad()
def by_hand(policy: AutoDecoPolicy, h: torch.Tensor, z: torch.Tensor):
    """T and top-p of rows in fp64."""
    h, z = h.double(), z.double()
    T = temperature_by_hand(policy.head, h)
    return T, top_p_by_hand(policy.top_p_head, h, z, T)


def rows(N: int = 24, H: int = 12, V: int = 90):
    g = torch.Generator().manual_seed(N)
    h = torch.randn(N, H, generator=g)
    z = torch.randn(N, V, generator=g) * torch.linspace(0.1, 2, N)[:, None]
    z[3, 10 : V - 10] = -torch.inf
    return h, z


def two_heads(H: int = 12, enhanced: bool = True, **options) -> AutoDecoPolicy:
    torch.manual_seed(3)
    heads = TemperatureHead(H, 16), TopPHead(H, enhanced, 16)
    for head in heads:
        torch.nn.init.normal_(head.mlp[2].weight, std=1.5)
    return AutoDecoPolicy(head=heads[0], top_p_head=heads[1], **options)


def policy_of(model, *, enhanced: bool = True, **options) -> AutoDecoPolicy:
    heads = {"head": tiny_head(model), "top_p_head": tiny_top_p_head(model, enhanced=enhanced)}
    return AutoDecoPolicy(**heads, **options)


# By hand


@pytest.mark.parametrize(
    ("backend", "enhanced"), [("torch", True), ("torch", False), ("triton", True)]
)
def test_both_heads_and_the_draw_are_those_written_out_in_fp64(backend, enhanced, monkeypatch):
    monkeypatch.setattr(
        "autodeco_fast.heads.prob_stats", partial(on_device.prob_stats, backend=backend)
    )
    monkeypatch.setattr(base, "sample", partial(on_device.sample, backend=backend))
    policy = two_heads(enhanced=enhanced)
    h, z = rows(5, V=40) if backend == "triton" else rows()  # the interpreter is slow
    with torch.no_grad():
        T, P = policy.pick(h, z if enhanced else None)
    want_T, want_P = by_hand(policy, h, z)
    torch.testing.assert_close(T.double(), want_T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(P.double(), want_P, rtol=2e-5, atol=1e-6)
    assert P.max() - P.min() > 0.3
    out = policy.sample(h, z, seed=7, position=3, return_kept=True)
    direct = on_device.sample(z, T, top_p=P, seed=7, position=3, return_kept=True, backend=backend)
    assert torch.equal(out.token, direct.token)
    assert torch.equal(out.kept, direct.kept)
    assert len(out.kept.unique()) > 2
    for i in range(len(z)):
        # The row index is the stream, so the rows before it stay.
        token, margin = reference(
            z[: i + 1], want_T[: i + 1], 0.0, seed=7, position=3, top_p=float(want_P[i])
        )
        assert_same_tokens(out.token[i : i + 1], token[i:], margin[i:])


def test_the_factor_on_t_leaves_what_the_second_head_sees():
    (h, z), policy = rows(), two_heads(scale=1.5, t_min=0.4, t_max=1.7)
    T, P = by_hand(policy, h, z)
    picked = policy.pick(h, z)
    used = (1.5 * T).clamp(0.4, 1.7)
    torch.testing.assert_close(picked.temperature.double(), used, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(picked.top_p.double(), P, rtol=2e-5, atol=1e-6)
    kept = policy.sample(h, z, seed=1, return_kept=True).kept
    want = torch.cat(
        [kept_set(z[i : i + 1].double(), used[i : i + 1], top_p=float(P[i])) for i in range(len(z))]
    )
    assert torch.equal(kept.long(), want.sum(1))


def test_greedy_rows_stay_greedy_and_top_p_stays_inside_its_range():
    h, z = rows()
    policy = two_heads()
    with torch.no_grad():
        policy.head.mlp[2].weight.zero_()
        policy.head.mlp[2].bias.fill_(-30.0)  # T = 2e-13
    out = policy.sample(h, z, seed=4)
    assert torch.equal(out.token, z.argmax(1))
    for bias, lowest, highest in ((-300.0, 0.0, 1e-37), (300.0, 1.0, 1.0)):
        policy = two_heads()
        with torch.no_grad():
            policy.top_p_head.mlp[2].weight.zero_()
            policy.top_p_head.mlp[2].bias.fill_(bias)
        T, P = policy.pick(h, z)
        assert lowest <= P.min()
        assert 0 < P.min() <= P.max() <= highest
        kept = policy.sample(h, z, seed=4, return_kept=True).kept.long()
        every = (z > -torch.inf).sum(1) if bias > 0 else torch.ones_like(kept)
        assert torch.equal(kept, torch.where(T < 1e-3, 1, every))


def test_a_head_that_is_none_is_switched_off():
    (h, z), both = rows(), two_heads()
    first = AutoDecoPolicy(head=both.head, top_p_head=None)
    assert first.pick(h).top_p is None
    without_cut = HeadPolicy(head=both.head, min_p=0.0)
    assert torch.equal(first.sample(h, z, seed=2).token, without_cut.sample(h, z, seed=2).token)
    second = AutoDecoPolicy(head=None, top_p_head=both.top_p_head)
    T, P = second.pick(h, z)
    assert (T == 1).all()
    want = top_p_by_hand(both.top_p_head, h.double(), z.double(), T.double())
    torch.testing.assert_close(P.double(), want, rtol=2e-5, atol=1e-6)


# In generate


@pytest.mark.parametrize(
    ("name", "enhanced"), [*((name, True) for name in NAMES), ("llama", False)]
)
def test_tokens_and_records_are_those_of_a_plain_loop(name, enhanced):
    model, ids = tiny_model(name), prompts(3)
    policy, text, want = policy_of(model, enhanced=enhanced), ids, []
    for step in range(STEPS):
        hidden, z = hidden_and_logits(model, text)
        T, P = (each.float() for each in by_hand(policy, hidden, z))
        out = on_device.sample(z.float(), T, top_p=P, seed=8, position=5 + step, return_kept=True)
        want.append((T, P, out.kept))
        text = torch.cat([text, out.token[:, None]], 1)
    heads = (policy.head, policy.top_p_head)
    with attach(model, heads[0], top_p_head=heads[1], record=True) as attached:
        assert torch.equal(model.generate(ids, max_new_tokens=STEPS, seed=8), text)
        assert len(attached.records) == STEPS
        for got, (T, P, kept) in zip(attached.records, want):
            torch.testing.assert_close(got.temperature, T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.top_p, P, rtol=1e-4, atol=1e-5)
            assert torch.equal(got.kept, kept.long())
    assert len({int(k) for *_, kept in want for k in kept}) > 3
    if name != "llama":
        return
    with attach(model, policy):  # neither recording nor the cache changes anything
        asked = {"max_new_tokens": STEPS, "seed": 8, "cache_implementation": "static"}
        assert torch.equal(model.generate(ids, **asked), text)


def test_left_padding_and_the_batch_change_nothing():
    model, ids = tiny_model("qwen3"), prompts(2)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    mask[:, 3:] = 1
    with attach(model, policy_of(model)):
        want = model.generate(ids, max_new_tokens=6, seed=[4, 5])
        got = model.generate(padded, attention_mask=mask, max_new_tokens=6, seed=[4, 5])
        assert torch.equal(got[:, 8:], want[:, 5:])
        assert torch.equal(model.generate(ids[1:], max_new_tokens=6, seed=[5])[0], want[1])
        several = model.generate(ids, max_new_tokens=6, seed=[4, 5], num_return_sequences=3)
        assert torch.equal(several[::3], want)
        assert len(several.unique(dim=0)) > 2


def test_streamers_stop_strings_and_pipelines():
    model, ids, tokenizer = tiny_model("llama"), prompts(1), tokenizer_of_characters()
    asked = {"max_new_tokens": 8, "seed": 6}
    with attach(model, policy_of(model)):
        want = model.generate(ids, **asked)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs={**asked, "streamer": streamer}
        )
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        text = tokenizer.decode(want[0, 5:], clean_up_tokenization_spaces=False)
        assert streamed == text
        stopped = model.generate(ids, **asked, stop_strings=[text[2]], tokenizer=tokenizer)
        assert torch.equal(stopped[0], want[0, : 6 + text.index(text[2])])
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        prompt = tokenizer("abc", return_tensors="pt").input_ids
        got = pipe("abc", **asked, return_tensors=True)[0]["generated_token_ids"]
        assert list(got) == model.generate(prompt, **asked)[0].tolist()


class Ban(LogitsProcessor):
    """Masks the likeliest token of every row."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf)


def distribution(z: torch.Tensor, T: torch.Tensor, P: torch.Tensor, min_p: float = 0.0):
    """softmax(z/T) cut at top-p, then Min-P, and renormalised, fp64."""
    kept = torch.cat(
        [kept_set(z[i : i + 1], T[i : i + 1], min_p, top_p=float(P[i])) for i in range(len(z))]
    )
    return (z / T[:, None]).masked_fill(~kept, -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_other_sampling_step_has_the_same_cut(name):
    model, ids = tiny_model(name), prompts(3)
    policy = policy_of(model)
    hidden, z = hidden_and_logits(model, ids)
    T, P = by_hand(policy, hidden, z)
    z = z.double()
    banned = Ban()(None, z)
    with attach(model, policy, record=True) as attached:

        def scores(**asked):
            out = model.generate(ids, max_new_tokens=1, seed=1, **asked, **EVERYTHING)
            return out.scores[0].double().softmax(-1)

        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        close(scores(), distribution(z, T, P))
        close(attached.records[0].top_p.double(), P)
        close(scores(min_p=0.3), distribution(z, T, P, 0.3))
        close(scores(temperature=2.0), distribution(z, 2 * T, P))
        five = z.masked_fill(z < z.topk(5).values[:, -1:], -torch.inf)
        close(scores(top_k=5), distribution(five, T, P))
        # A cut is of what processors leave; what is predicted is of the model's own logits.
        close(scores(logits_processor=[Ban()]), distribution(banned, T, P))
        fused = model.generate(ids, max_new_tokens=1, seed=3, logits_processor=[Ban()])
        want = on_device.sample(
            banned.float(), T.float(), top_p=P.float(), seed=3, position=5, return_kept=True
        )
        assert torch.equal(fused[:, 5], want.token)
        assert torch.equal(attached.records[0].kept, want.kept.long())
    with attach(model, policy, fused=False):
        unfused = model.generate(ids, max_new_tokens=1, seed=1)
    assert (distribution(z, T, P).gather(1, unfused[:, 5:]) > 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "assisted"])
def test_every_candidate_has_its_own_top_p(name):
    candidates = {"prompt_lookup_num_tokens": 3, "eos_token_id": NEVER}
    if name == "assisted":
        name, candidates = "llama", {"assistant_model": tiny_model("qwen3")}
    model, ids = tiny_model(name), prompts(1, 4).repeat(1, 3)
    policy = policy_of(model, min_p=0.01)
    asked = {**candidates, "max_new_tokens": 8, "seed": 5}
    with attach(model, policy):
        out = model.generate(ids, **asked, **EVERYTHING)
        assert torch.equal(model.generate(ids, **asked), out.sequences)
    assert len(out.scores) == 8
    kept = set()
    for i, scores in enumerate(out.scores):
        hidden, z = hidden_and_logits(model, out.sequences[:, : 12 + i])
        want = distribution(z.double(), *by_hand(policy, hidden, z), 0.01)
        torch.testing.assert_close(scores.softmax(-1).double(), want, rtol=1e-4, atol=1e-5)
        assert want[0, out.sequences[0, 12 + i]] > 0
        kept.add(int((want > 0).sum()))
    assert len(kept) > 2


def test_logits_are_made_for_the_second_head_alone():
    model, ids = tiny_model("llama"), prompts()
    both = policy_of(model)
    with attach(model, both) as attached:
        assert not attached.lazy
    first = AutoDecoPolicy(head=both.head, top_p_head=None)
    with attach(model, first, record=True) as attached:
        assert attached.lazy
        got = model.generate(ids, max_new_tokens=3, seed=1)
        assert attached.records[0].top_p is None
    with attach(model, both.head, min_p=0.0):
        assert torch.equal(model.generate(ids, max_new_tokens=3, seed=1), got)


def test_a_model_that_is_greedy_under_two_heads():
    model, ids = tiny_model("qwen3"), prompts(4)
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    with attach(model, policy_of(model), t_max=0.0, record=True) as attached:
        assert torch.equal(model.generate(ids, max_new_tokens=6, seed=3), want)
        assert all((record.kept == 1).all() for record in attached.records)


def test_heads_in_bfloat16():
    model, ids = tiny_model("llama").to(torch.bfloat16), prompts()
    policy = policy_of(model)
    for dtype in (torch.float32, torch.bfloat16):
        heads = policy.head.to(dtype), policy.top_p_head.to(dtype)
        with attach(model, heads[0], top_p_head=heads[1], record=True) as attached:
            assert model.generate(ids, max_new_tokens=3).shape == (2, 8)
            assert attached.records[0].top_p.dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_forward_follows_both_heads():
    torch._dynamo.reset()
    model, ids = of_one_layer("llama"), prompts()
    policy = policy_of(model)
    hidden, z = hidden_and_logits(model, ids)
    T, P = by_hand(policy, hidden, z)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(ids, use_cache=False).logits
    with attach(model, policy) as attached:
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)
        call = Call(fused=True, policy=policy, seed=0, stream=None)
        with attached.gate.called(call), attached.gate.opened():
            scaled = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(scaled[:, -1].double(), z / T[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call.top_p.double(), P, rtol=1e-4, atol=1e-5)


# As text, and what is refused


def test_two_heads_are_read_from_their_folder(tmp_path):
    folder = tmp_path / "two heads"
    both = two_heads()
    TemperatureHead(12, 16, min_p=0.05).save_pretrained(folder)
    both.top_p_head.save_pretrained(folder / "top_p_head")
    policy = parse(f"autodeco='{folder}' scale=0.9 min_p=0.02")
    assert (policy.min_p, policy.scale, policy.kind) == (0.02, 0.9, "autodeco")
    assert torch.equal(policy.top_p_head.mlp[0].weight, both.top_p_head.mlp[0].weight)
    assert str(parse(str(policy))) == str(policy)
    assert str(policy) == f"autodeco='{folder}' min_p=0.02 scale=0.9"
    assert parse(f"autodeco='{folder}'").min_p == 0.0  # AutoDeco's sampler has none
    (folder / "top_p_head/head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"autodeco=.*top_p_head' has no head.safetensors"):
        parse(f"autodeco='{folder}'")


def test_what_is_refused():
    model = tiny_model("llama")
    head, top_p_head = tiny_head(model), tiny_top_p_head(model)
    for words, wrong in (
        ("top_p_head goes with a temperature head, got policy 'static T=1'",
         lambda: attach(model, parse("static T=1"), top_p_head=top_p_head)),
        ("top_p_head must be a Module, got 'x'",
         lambda: attach(model, head, top_p_head="x")),
        ("top_p_head must be a TopPHead, got a TemperatureHead",
         lambda: attach(model, head, top_p_head=head)),
        ("top_p_head reads hidden states of width 8, the temperature head of 32",
         lambda: attach(model, head, top_p_head=TopPHead(8))),
        ("reads hidden states of width 8, the model's have 32",
         lambda: attach(model, TemperatureHead(8), top_p_head=TopPHead(8))),
        ("must not both be None", lambda: AutoDecoPolicy(head=None)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            wrong()
    with (
        attach(model, head, top_p_head=top_p_head, record=True),
        pytest.raises(ValueError, match="one token a step"),
    ):
        model.generate(prompts(1), max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_a_row_of_nan_is_named():
    model, ids = tiny_model("llama"), prompts(2)
    with attach(model, policy_of(model)):
        with torch.no_grad():
            model.get_output_embeddings().weight[7] = torch.nan
        with pytest.raises(RuntimeError, match=r"row.* cannot be sampled from"):
            model.generate(ids, max_new_tokens=2)
