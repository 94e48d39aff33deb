"""`attach(model, policy)`: the tokens, the cuts, records, ranges and what is refused."""

import pytest
import torch
from transformers import LogitsProcessor

from autodeco_fast import HeadPolicy, Policy, Static, attach
from autodeco_fast.policies import AdaptiveP, parse
from autodeco_fast.policies.masking import masked
from tests.tiny_models import (
    NEVER,
    every_model,
    hidden_and_logits,
    logits_and_temperature,
    min_p_distribution,
    of_one_layer,
    prompts,
    tiny_head,
    tiny_model,
    undecided_prompt,
)

TEXTS = [
    *("greedy", "static T=0.7 min_p=0.1", "static T=1.3 min_p=0.02 top_k=20 top_p=0.8"),
    *("top_n_sigma T=1.5", "p_less T=2", "min_k T=3 tau=30", "entropy a=0.5 power=0.5 top_p=0.9"),
    *("edt t0=1.2 theta=0.3 min_p=0.05", "adaptive_p target=0.3 min_p=0.02"),
]
MEMORYLESS = [text for text in TEXTS if not text.startswith("adaptive_p")]
EVERYTHING = {"return_dict_in_generate": True, "output_scores": True}
STEPS = 5


def policies(model) -> list[Policy]:
    head = HeadPolicy(head=tiny_head(model), scale=1.2, t_min=0.5, t_max=1.1, top_k=12)
    return [head, *map(parse, TEXTS)]


@every_model
def test_tokens_and_records_are_those_drawn_by_hand(name):
    model, ids = tiny_model(name), prompts(3)
    for policy in policies(model):
        text, running = ids, policy.started()
        want = []
        for step in range(STEPS):
            hidden, logits = hidden_and_logits(model, text)
            T = policy.temperatures(hidden, logits)
            scaled = logits.float() / torch.where(T < 1e-3, 1e-20, T)[:, None]
            cut = running.cut(scaled)
            out = cut.sample(scaled, seed=8, position=5 + step, return_kept=True)
            running.drawn(out.token)
            if not policy.remembers:
                by_hand = policy.sample(hidden, logits, seed=8, position=5 + step)
                assert torch.equal(by_hand.token, out.token)
            want.append((T, out.kept))
            text = torch.cat([text, out.token[:, None]], 1)
        with attach(model, policy, record=True) as attached:
            assert torch.equal(model.generate(ids, max_new_tokens=STEPS, seed=8), text), policy
            assert len(attached.records) == STEPS
            for got, (T, kept) in zip(attached.records, want):
                torch.testing.assert_close(got.temperature, T, rtol=1e-4, atol=1e-5)
                cold = T < 1e-3
                assert torch.equal(got.kept, torch.where(cold, 1, kept.long())), policy
        with attach(model, policy):  # recording changes nothing
            assert torch.equal(model.generate(ids, max_new_tokens=STEPS, seed=8), text)


@pytest.mark.parametrize("text", MEMORYLESS)
def test_the_other_sampling_step_has_the_same_cut(text):
    model, ids, policy = tiny_model("gemma2"), prompts(3), parse(text)
    hidden, logits = hidden_and_logits(model, ids)
    T = policy.temperatures(hidden, logits)
    scaled = logits.float() / torch.where(T < 1e-3, 1e-20, T)[:, None]
    want = masked(scaled, policy.cut(scaled))
    with attach(model, policy, record=True) as attached:
        out = model.generate(ids, max_new_tokens=2, seed=1, **EVERYTHING)
        torch.testing.assert_close(out.scores[0], want, rtol=1e-4, atol=1e-5)
        kept = (want > -torch.inf).sum(1)
        assert torch.equal(attached.records[0].kept, torch.where(T < 1e-3, 1, kept))
        assert len(attached.records) == 2
        candidates = {"prompt_lookup_num_tokens": 2, "eos_token_id": NEVER, "max_new_tokens": 4}
        with pytest.raises(ValueError, match="record=True needs one token a step"):
            model.generate(ids[:1], **candidates)
    with attach(model, policy):
        out = model.generate(ids[:1].repeat(1, 3), seed=1, **candidates, **EVERYTHING)
    assert out.scores[0].gather(1, out.sequences[:, 15:16]).isfinite().all()
    with attach(model, policy, fused=False):
        unfused = model.generate(ids, max_new_tokens=2, seed=1)
    assert want.gather(1, unfused[:, 5:6]).isfinite().all()


class Ban(LogitsProcessor):
    """Masks the likeliest token of every row."""

    def __call__(self, input_ids, scores):
        self.seen = scores.clone()
        return scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf)


@pytest.mark.parametrize("text", ["top_n_sigma T=1.5", "p_less T=2", "min_k T=3 tau=30"])
def test_a_cut_is_made_of_what_processors_leave(text):
    model, ids, policy, ban = tiny_model("llama"), prompts(3), parse(text), Ban()
    _, logits = hidden_and_logits(model, ids)
    scaled = ban(ids, logits / policy.temperature)
    want = policy.cut(scaled).sample(scaled, seed=4, position=5, return_kept=True)
    plain = policy.cut(ban.seen).sample(ban.seen, seed=4, position=5, return_kept=True)
    assert not torch.equal(want.kept, plain.kept)
    with attach(model, policy, record=True) as attached:
        out = model.generate(ids, max_new_tokens=1, seed=4, logits_processor=[ban])
        assert torch.equal(out[:, 5], want.token)
        assert torch.equal(attached.records[0].kept, want.kept.long())
        torch.testing.assert_close(ban.seen, logits / policy.temperature)
        out = model.generate(
            ids, max_new_tokens=1, logits_processor=[ban], renormalize_logits=True, **EVERYTHING
        )
    assert torch.equal((out.scores[0] > -torch.inf).sum(1), want.kept.long())
    torch.testing.assert_close(out.scores[0].exp().sum(1), torch.ones(3))  # normalised after it


def test_settings_of_the_call_keep_their_meaning():
    model = tiny_model("llama")
    head = tiny_head(model)
    ids = undecided_prompt(model, head)
    z = logits_and_temperature(model, head, ids)[0]

    def kept(policy, **settings) -> torch.Tensor:
        with attach(model, policy):
            out = model.generate(ids, max_new_tokens=1, **settings, **EVERYTHING)
        return out.scores[0][0] > -torch.inf

    static = Static(temperature=0.8, min_p=0.3, top_k=40)
    assert torch.equal(kept(static, min_p=0.05), min_p_distribution(z[0], 0.8, 0.05) > 0)
    assert torch.equal(kept(static, temperature=2.0), min_p_distribution(z[0], 1.6, 0.3) > 0)
    assert kept(static, top_k=2, min_p=0.0).sum() == 2
    sigma = parse("top_n_sigma n=1.2 T=0.9")
    assert torch.equal(kept(sigma, temperature=3.0), kept(sigma))
    both = kept(sigma) & (min_p_distribution(z[0], 0.9, 0.5) > 0)
    assert torch.equal(kept(sigma, min_p=0.5), both)
    with attach(model, static, record=True) as attached:
        model.generate(ids, max_new_tokens=1, min_p=0.05)
        assert attached.records[0].kept == (min_p_distribution(z[0], 0.8, 0.05) > 0).sum()
        with pytest.raises(ValueError, match="min_p must be in"):
            model.generate(ids, max_new_tokens=1, min_p=1.5)


def test_what_attach_says_beside_the_policy():
    model, ids = tiny_model("llama"), prompts(2)
    head = tiny_head(model)
    T = logits_and_temperature(model, head, ids)[1].float()

    def recorded(policy, **options) -> tuple[torch.Tensor, Policy]:
        with attach(model, policy, record=True, **options) as attached:
            model.generate(ids, max_new_tokens=1)
            return attached.records[0].temperature, attached.policy

    got, policy = recorded(head, scale=0.5, t_min=0.3, t_max=0.6, min_p=0.2)
    torch.testing.assert_close(got, (0.5 * T).clamp(0.3, 0.6))
    assert policy.min_p == 0.2
    got, policy = recorded(Static(temperature=0.8, scale=0.5, min_p=0.1), scale=3.0, t_max=1.1)
    torch.testing.assert_close(got, torch.full((2,), 1.1))
    assert (policy.scale, policy.min_p) == (1.5, 0.1)
    for wrong in ({"scale": 0}, {"t_min": -1}, {"t_max": 0.1, "t_min": 0.2}, {"scale": "2"}):
        for each in (head, Static(temperature=1.0)):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                attach(model, each, **wrong)
    with pytest.raises(ValueError, match=r"head or a policy, got 'static T=1'"):
        attach(model, "static T=1")


def test_greedy_is_the_argmax():
    model, ids = tiny_model("qwen3"), prompts(4)
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    cold = HeadPolicy(head=tiny_head(model), t_max=0.0)
    for policy in (parse("greedy"), cold, parse("p_less T=0"), parse("entropy a=1e-9")):
        with attach(model, policy):
            assert torch.equal(model.generate(ids, max_new_tokens=6, seed=3), want)


def test_logits_are_made_only_where_a_policy_reads_them():
    model = tiny_model("llama")
    for policy in policies(model):
        with attach(model, policy) as attached:
            assert attached.lazy == (policy.kind in ("head", "static"))


def test_records_are_of_the_last_call_and_off_by_default():
    model, ids = tiny_model("llama"), prompts(2)
    with attach(model, Static(temperature=1.0)) as attached:
        model.generate(ids, max_new_tokens=3)
        assert attached.records == []
    with attach(model, Static(temperature=1.0), record=True) as attached:
        assert attached.records == []
        model.generate(ids, max_new_tokens=3, num_return_sequences=2)
        first = attached.records
        assert [step.kept.tolist() for step in first] == [[96] * 4] * 3
        model.generate(ids, max_new_tokens=2)
        assert len(attached.records) == 2
        assert len(first) == 3
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert attached.records == []


def test_a_policy_that_remembers_needs_the_fused_sampler():
    model, ids, policy = tiny_model("llama"), prompts(2), AdaptiveP()
    with attach(model, policy):
        first = model.generate(ids, max_new_tokens=6, seed=1)
        assert torch.equal(model.generate(ids, max_new_tokens=6, seed=1), first)  # begins anew
        for asked in ({"top_k": 5}, {"temperature": 2.0}, EVERYTHING):
            with pytest.raises(ValueError, match=f"adaptive_p needs.*{list(asked)[-1]}"):
                model.generate(ids, max_new_tokens=2, **asked)
    with (
        attach(model, policy, fused=False),
        pytest.raises(ValueError, match=r"adaptive_p needs the fused sampler.*fused=False"),
    ):
        model.generate(ids, max_new_tokens=2)


@every_model
@pytest.mark.parametrize("text", ["static T=0.7 top_p=0.9", "top_n_sigma", "edt t0=1 theta=0.2"])
def test_detaching_gives_the_model_back(name, text):
    model, ids = tiny_model(name), prompts()
    cls = type(model)
    want = model(ids).logits
    attachment = attach(model, parse(text))
    model.generate(ids, max_new_tokens=2)
    assert torch.equal(model(ids).logits, want)  # forwards outside generate are the model's own
    with pytest.raises(ValueError, match="already"):
        attach(model, parse(text))
    attachment.detach()
    assert type(model) is cls
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(ids).logits, want)


def test_left_padding_and_seeds_a_prompt_hold_for_policies():
    model, ids = tiny_model("llama"), prompts(2)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    mask[:, 3:] = 1
    for text in ("min_k", "entropy a=0.5", "adaptive_p"):
        with attach(model, parse(text)):
            want = model.generate(ids, max_new_tokens=6, seed=[4, 5])
            got = model.generate(padded, attention_mask=mask, max_new_tokens=6, seed=[4, 5])
            assert torch.equal(got[:, 8:], want[:, 5:])
            alone = model.generate(ids[1:], max_new_tokens=6, seed=[5])
            assert torch.equal(alone[0], want[1])


@pytest.mark.slow
@pytest.mark.parametrize("text", ["static T=0.5", "entropy a=0.4", "edt t0=1 theta=0.3"])
def test_a_compiled_forward_follows_the_policy(text):
    torch._dynamo.reset()
    model, ids = of_one_layer("llama"), prompts()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(ids, use_cache=False).logits
    with attach(model, parse(text)) as attached:
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)
        with attached.gate.opened():
            scaled = compiled(ids, use_cache=False).logits
    T = parse(text).temperatures(torch.zeros(*plain.shape[:-1], 1), plain)
    torch.testing.assert_close(scaled, plain / T[..., None])
