"""The study of domains: what a policy makes of logits, and which tokens are facts."""

import numpy as np
import pytest
import torch

from autodeco_fast.policies import parse
from autodeco_fast.training import base_model
from autodeco_fast.training.scan_store import Scan
from bench.quality import domains, domains_text, exact
from tests.scans import make_scan
from tests.tiny_models import tiny_model


def test_what_a_policy_makes_of_logits(tmp_path):
    base = base_model.wrap(tiny_model("llama"))
    tokens = Scan(make_scan(tmp_path, base=base)).load()
    logits = domains.logits_of(base, tokens)
    z = base.logits(tokens.hidden.float()).double()
    y = tokens.target.long()[:, None]
    log_p, nats, T = domains.look(parse("static T=0.7 min_p=0.3"), logits, tokens)
    p = (z / 0.7).softmax(-1)
    p = torch.where(p >= 0.3 * p.amax(-1, keepdim=True), p, 0.0)
    p /= p.sum(-1, keepdim=True)
    torch.testing.assert_close(log_p.exp().double(), p.gather(1, y)[:, 0], rtol=1e-4, atol=1e-6)
    expected = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(nats.double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.min() < 0.8 * expected.max()
    assert (T == 0.7).all()
    log_p, nats, _ = domains.look(parse("greedy"), logits, tokens)
    assert torch.equal(log_p == 0, z.argmax(-1) == y[:, 0])
    assert (nats == 0).all()


def test_a_head_is_held_against_fixed_settings():
    def measured(error: float, nats: float) -> domains.Measured:
        T = dict.fromkeys(("facts", "words", "open"), 0.5)
        return domains.Measured(np.full(40, error), np.full(30, nats), T)

    seeds = [measured(0.1, 1.0), measured(0.3, 1.0)]
    fixed = {"greedy": [measured(0.0, 0.0)], "static T=1": [measured(0.8, 2.0)]}
    found = {one["variant"]: one for one in exact.results({**fixed, "hinge-maths": seeds}, "nats")}
    head = found["hinge-maths"]
    assert head["error"] == pytest.approx(0.2)
    assert head["error_of_static_at_equal_diversity"] == pytest.approx(0.4)
    assert head["ratio"] == pytest.approx(0.5)
    assert head["ratio_95"] == pytest.approx([0, 1 / 0.4])  # two seeds say next to nothing
    assert "ratio" not in found["greedy"]


def test_answers_to_one_question_are_resampled_together():
    """Three answers to each of 20 questions, the same ones: as sure as of 20, not of 60."""
    rng = np.random.default_rng(0)
    of_question = torch.tensor(rng.normal(1.0, 0.5, 20)).float()
    document = torch.arange(60).repeat_interleave(4)
    jitter = torch.tensor([-0.2, 0.2, -0.1, 0.1]).repeat(60)
    nats = domains.by_question(of_question[document % 20] + jitter, document, 20)
    assert nats == pytest.approx(of_question.numpy(), abs=1e-6)
    T = dict.fromkeys(("facts", "words", "open"), 0.5)
    one = domains.Measured(np.full(40, 0.5), nats, T)
    assert one.sizes == (40, 20)
    (found,) = exact.results({"static T=1": [one]}, "nats")
    low, high = found["nats_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * nats.std() / 20**0.5, rel=0.1)


def test_a_short_answer_counts_as_much_as_a_long_one():
    values, document = torch.tensor([1.0, 3.0, 8.0, 5.0]), torch.tensor([0, 0, 2, 1])
    assert domains.by_question(values, document, 2).tolist() == [5.0, 5.0]


def test_what_heads_learn_from_is_not_what_they_are_measured_on():
    questions = {question for question, _, _ in domains_text.FACTS}
    assert len(questions) == len(domains_text.FACTS)
    learned = {*domains_text.MATHS, *domains_text.DIALOGUE}
    assert not learned & ({*domains_text.OPEN} | questions)
    assert len(set(domains_text.MATHS)) == len(domains_text.MATHS)
