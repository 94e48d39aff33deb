"""The study of listed answers: which answer a text is, and how likely each is under a policy."""

import json

import numpy as np
import pytest
import torch

from autodeco_fast.policies import parse
from autodeco_fast.training import base_model
from bench.quality import exact, novelty
from bench.quality import novelty_text as texts
from bench.quality.answer_tree import AnswerTree, ends_of
from bench.quality.novelty_text import Question
from tests.tiny_models import min_p_distribution, tiny_model, tokenizer_of_characters

END = 40
QUESTIONS = (
    Question("one", "Pick?", (("Ab", "A"), ("Ac",), ("b",))),
    Question("two", "Or?", (("x",), ("yyz",))),
)


def test_which_answer_a_text_is():
    by_name = {question.name: question for part in texts.PARTS.values() for question in part}
    assert by_name["twenties"].answers[0] == ("20",)
    assert by_name["odd"].answers[-1] == ("29",)
    lakes, cards = by_name["lake"], by_name["card"]
    assert lakes.answer(" Erie") == lakes.answer("lake erie.\nIt is small.") == 3
    assert cards.answer(" 7 of Clubs") == cards.answer("seven of clubs.")
    assert len({cards.answer(s) for s in cards.spellings()}) == len(cards.answers) == 52
    for wrong in ("", "Erie, of course", "Erie..", "Como"):
        assert lakes.answer(wrong) is None


def test_parts_ask_different_things():
    questions = [question for part in texts.PARTS.values() for question in part]
    for key in ("name", "text", "answers"):
        assert len({getattr(question, key) for question in questions}) == len(questions)
    for question in questions:
        spellings = [text.lower() for answer in question.answers for text in answer]
        assert len(set(spellings)) == len(spellings), question.name


def test_rewards():
    said, task = ["Heads", "tails.", "Heads", "edge", "A"], ["coin"] * 4 + ["vowel"]
    assert texts.valid(said, task) == [1, 1, 1, 0, 1]
    assert texts.alone(said, task) == [0, 1, 0, 0, 1]
    assert texts.alone(["A", "A"], ["vowel", "letter"]) == [1, 1]


@pytest.fixture(scope="module")
def tree() -> tuple[AnswerTree, base_model.BaseModel, object]:
    tokenizer, model = tokenizer_of_characters(), tiny_model("llama")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.generation_config.eos_token_id = END
    base = base_model.wrap(model)
    assert ends_of(base, tokenizer).tolist() == [END]
    return AnswerTree(QUESTIONS, base, tokenizer), base, tokenizer


@pytest.mark.parametrize(("policy", "T", "min_p"), [("static T=0.7 min_p=0.1", 0.7, 0.1),
                                                    ("static T=1.5", 1.5, 0.0)])  # fmt: skip
def test_the_chance_of_an_answer_is_that_of_its_spellings(tree, policy, T, min_p):
    tree, base, tokenizer = tree
    p, begins, ends = tree.chances({policy: parse(policy), "greedy": parse("greedy")})[policy]
    assert len(begins) == 2
    assert len(ends) == 2 * sum(len(q.spellings()) for q in QUESTIONS)
    for question, found in zip(QUESTIONS, p):
        expected = np.zeros(len(question.answers))
        prompt = tokenizer(question.prompt(tokenizer)).input_ids
        for text, answer in question.spellings().items():
            for written in (f" {text}", f" {text}."):
                ids = tokenizer(written).input_ids
                with torch.no_grad():
                    z = base.model(torch.tensor([prompt + ids])).logits[0].double()
                law = min_p_distribution(z, T, min_p)[len(prompt) - 1 :]
                chance = law[range(len(ids)), ids].prod() * law[len(ids), END]
                expected[answer] += chance.item()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-12)
    if not min_p:
        assert all((some > 0).all() for some in p)


def test_greedy_gives_one_answer_or_none(tree):
    p, begins, _ = tree[0].chances({"greedy": parse("greedy")})["greedy"]
    assert (begins == 0).all()
    assert all(one == pytest.approx(0) or one == pytest.approx(1) for some in p for one in some)


def test_measures_of_chances():
    p = [[0.5, 0.0], [0.25] * 4, [0.0] * 3]
    found = novelty.measured(p, {"begins": 1.0, "ends": 0.5})
    np.testing.assert_allclose(found.valid, [0.5, 1, 0])
    np.testing.assert_allclose(found.diversity, [0, 1, 0], atol=1e-9)
    assert found.distinct[1] == pytest.approx(1)
    assert found.distinct[2] == 0
    assert found.distinct[0] == pytest.approx((1 - 0.5**10) / (2 * (1 - 0.5**10)))
    assert found.means() == {
        "distinct": pytest.approx(0.5), "temperature_begins": 1.0, "temperature_ends": 0.5,
    }  # fmt: skip


def test_chances_that_are_known_are_not_computed_again(tmp_path):
    known = {"greedy": {"answers": [[1.0, 0.0]], "temperature": {"begins": 0.0, "ends": 0.0}}}
    (tmp_path / "novelty-test-chances.json").write_text(json.dumps(known))
    found = novelty.measure(tmp_path, "no model", "test", {"greedy": ["greedy"]})
    assert found["greedy"][0].valid.tolist() == [1.0]
    with pytest.raises(ValueError, match="no model"):
        novelty.measure(tmp_path, "no model", "test", {"static T=1": ["static T=1"]})


def test_what_was_chosen_is_held_against_the_fixed_setting(tmp_path):
    def made(valid: float, diversity: float) -> novelty.Measured:
        n = len(texts.TEST)
        some = (np.full(n, value) for value in (valid, diversity, valid * diversity))
        return novelty.Measured(*some, {"begins": 1.0, "ends": 1.0})

    fixed = {"greedy": [made(1.0, 0.0)], "static T=1": [made(0.2, 1.0)],
             "static T=2": [made(0.1, 0.9)]}  # fmt: skip
    study = fixed | {"rewards-0.01": [made(0.8, 0.5), made(0.8, 0.7)]}
    chosen = {"static": "static T=1", "rewards-valid": "rewards-0.01"}
    found = {one["variant"]: one for one in novelty.against(study, chosen)}
    head = found["rewards-0.01"]
    assert head["chosen_of"] == "rewards-valid"
    assert "chosen_of" not in found["greedy"]
    assert head["ratio"] == pytest.approx(0.2 / 0.48)
    assert head["distinct_over_static"]["ratio"] == pytest.approx(0.48 / 0.2)
    # Two seeds say next to nothing.
    assert head["distinct_over_static"]["ratio_95"] == pytest.approx([0, 1 / 0.2])
    assert set(head["by_question"]) == {question.name for question in texts.TEST}
    novelty.draw(list(found.values()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_every_family_tries_no_more_settings_than_the_fixed_ones(tmp_path):
    tried = novelty.families(tmp_path)
    most = len(tried["static"])
    assert all(0 < len(some) <= most for some in tried.values())
    assert {"rewards-valid", "rewards-alone", "hinge-maths", "records", "entropy"} < set(tried)
    for text in (*tried["static"], *(t for family in novelty.RULES for t in tried[family])):
        parse(text)
    assert len(exact.resamples((3, 2))[0]) == 2
