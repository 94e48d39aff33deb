"""What the quality studies rest on: the sums language, and the comparison with static settings."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch

from autodeco_fast import nucleus_width_loss
from autodeco_fast.training import wishes as package_wishes
from autodeco_fast.training.data import encode
from autodeco_fast.training.measures import _gap_of_mass
from autodeco_fast.training.scan_store import ScanTokens
from bench.quality import frontier, records_study, sums, sums_model, sums_study, v_curve, wishes
from tests.checkpoint_folders import chat_model


def test_every_text_of_the_language_is_valid_and_a_changed_number_is_not():
    rng = random.Random(0)
    for _ in range(300):
        text = sums.text(rng)
        features = sums.parse(text)
        assert set(features) == {*sums.FEATURES, "operand"}
        assert f" {features['operand']}=" in text
        assert sums.validity([sums.BEGIN], [text[1:]]) == [1.0]
        total = text.rpartition(";")[2].split()[0]
        wrong = text.replace(f";{total}", f";{int(total) + 1}")
        assert sums.parse(wrong) is None
        assert sums.parse(text[:-5]) is None


def test_what_the_language_says_of_a_text():
    """The probability of the text, and which of its characters are free."""
    for seed in range(100):
        text, nats, free = sums.written(random.Random(seed))
        numbers = [int(n) for n in re.findall(r"(?<=[ =])\d+", text.partition(";")[0])]
        moves = [min(9, n) + min(9, 40 - n) for n in numbers[:-1]]
        assert nats == pytest.approx(math.log(12 * 20 * 8 * 4 * 8 * math.prod(moves)))
        assert len(free) == len(text)
        for forced in (r"=\d+", r";\d+ ", r"^#", r"\n", r"(?<=\d) "):
            for found in re.finditer(forced, text):
                if found.start() != text.index(" ") + 2:  # "1" begins "12", too
                    assert not any(free[found.start() + 1 : found.end()])
        assert free[1]  # the name


def test_the_model_stops_at_its_excess(tmp_path, monkeypatch, capsys):
    """And is measured against what the language itself has."""
    monkeypatch.setattr(sums_model, "BATCH", 4)
    monkeypatch.setattr(sums_model, "WINDOW", 2)
    sums_model.train(tmp_path / "model", excess=1e9, steps=10)
    assert capsys.readouterr().out.startswith("step 1: ")
    assert "step 3" not in capsys.readouterr().out
    found = sums_model.measured(tmp_path / "model", texts=8)
    assert 3.0e6 < found["parameters"] < 3.1e6
    assert 50 < found["excess"] < 200  # from ln 46 a character
    assert found["forced_errors"] == 1.0


def test_the_tokenizer_gives_a_text_back():
    text, words = sums.text(random.Random(1)), sums_model.tokenizer()
    ids = words(text).input_ids
    assert len(ids) == len(text)
    assert ids[0] == words.bos_token_id
    assert ids[-1] == words.eos_token_id
    assert words.decode(ids) == text


def test_entropy_of_values_of_known_number():
    """Not lower for being drawn less often; 1 at most."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        records = [{"a": str(v)} if v < 9 else None for v in rng.integers(10, size=100)]
        found += frontier.Lines("", {"a": 12}, records, []).entropies(range(100))
    assert np.mean(found) == pytest.approx(math.log(9) / math.log(12), abs=0.002)
    even = frontier.Lines("", {"a": 2}, [{"a": "x"}, {"a": "y"}], [])
    assert even.entropies([0, 1]) == [1.0]
    assert even.entropies([0]) == [0.0]


def test_the_edge_is_made_of_settings_that_no_other_beats():
    diversity = np.array([0.2, 0.5, 0.5, 0.8, 0.7])
    error = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    at = np.array([0.2, 0.5, 0.8, 0.65, 0.1, 0.9])
    expected = [0.1, 0.2, 0.4, 0.3, 0.1, 0.4]  # the last two are beyond it
    assert frontier.static_error(error, diversity, at) == pytest.approx(expected)


def test_a_policy_is_compared_at_its_own_diversity():
    static = [np.tile([0.1, 0.5], (50, 1)), np.tile([0.3, 0.9], (50, 1))]
    found = frontier.compare(np.tile([0.1, 0.7], (50, 1)), static)
    assert found["error_of_static_at_equal_diversity"] == pytest.approx(0.2)
    assert found["ratio"] == pytest.approx(0.5)
    assert found["ratio_95"] == pytest.approx([0.5, 0.5])


def test_no_error_has_no_interval(tmp_path, capsys):
    """Resamples of no errors have no width, which would look like certainty."""
    none, some = np.tile([0.0, 0.5], (50, 1)), np.tile([0.2, 0.5], (50, 1))
    assert frontier.over(none, some) == {"ratio": 0.0, "ratio_95": None}
    assert frontier.over(some, none) == {"ratio": None, "ratio_95": None}
    few = np.where(np.arange(50) % 10 == 9, 0.0, 0.1)[:, None].repeat(2, 1)
    assert frontier.over(some, few) == {"ratio": 2.0, "ratio_95": None}
    assert frontier.compare(none, [some])["ratio_95"] is None
    samples = {"static T=1": [" 1}", " 2}", "x"] * 4, "min_k": [" 1}", " 2}"] * 6, "edt": ["x"] * 3}
    found = frontier.results(frontier.read([evaluation(tmp_path / "e", samples)]))
    by_name = {result["variant"]: result for result in found}
    assert by_name["min_k"]["error_95"] is by_name["min_k"]["ratio_95"] is None
    assert len(by_name["static T=1"]["error_95"]) == len(by_name["edt"]["ratio_95"]) == 2
    frontier.draw(found, tmp_path / "figure.png")
    frontier.print_ranking(found, "diversity")
    assert re.search(r"min_k  ratio 0\.00$", capsys.readouterr().out, re.MULTILINE)


def evaluation(folder, samples: dict[str, list[str]], seed: int = 0):
    """A folder as `autodeco-fast eval` leaves it, of one prompt."""
    folder.mkdir()
    prompt = {"prompt": '{"a":', "keys": ["a"], "prefix": '{"a":', "task": "t"}
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    settings = {"prompts": str(folder / "prompts.jsonl"), "scorer": "json", "seed": seed}
    (folder / "results.json").write_text(json.dumps({"settings": settings}))
    lines = (
        json.dumps({"policy": policy, "prompt": 0, "text": text, "temperature": [1.0]}) + "\n"
        for policy, texts in samples.items()
        for text in texts
    )
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def test_results_of_an_evaluation(tmp_path):
    same, differ = [" 1}"] * 3 + ["x"], [f" {i}}}" for i in range(4)]
    samples = {"static T=0.5": same, "static T=1": differ[:2] + ["x"] * 2}
    folders = [evaluation(tmp_path / "e", samples)]
    for seed in (0, 1):
        of_seed = {f"head=/a/b-seed{seed} scale=2": differ}
        folders.append(evaluation(tmp_path / f"e{seed}", of_seed, seed))
    found = frontier.results(frontier.read(folders))
    by_name = {result["variant"]: result for result in found}
    assert set(by_name) == {"static T=0.5", "static T=1", "head=b scale=2"}
    assert by_name["static T=0.5"]["error"] == 0.25
    assert by_name["static T=0.5"]["diversity"] == 0.0
    assert by_name["static T=1"]["diversity"] == pytest.approx(0.5)  # two of four, and differ
    head = by_name["head=b scale=2"]
    assert (head["seeds"], head["error"], head["ratio"]) == (2, 0.0, 0.0)
    assert head["diversity"] == pytest.approx(1.0)
    assert head["error_of_static_at_equal_diversity"] == pytest.approx(0.5)
    frontier.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_what_is_best_at_a_diversity(tmp_path):
    valid = [f" {i}}}" for i in range(8)]
    samples = {"a": [" 1}"] * 8, "b": valid[:2] * 4, "c": valid[:7] + ["x"], "d": valid[:2] + ["x"]}
    samples = {f"static T={name}": texts for name, texts in samples.items()}
    study = frontier.read([evaluation(tmp_path / "e", samples)])
    assert frontier.best_at(study, (0.0, 0.9, 1.1)) == ["static T=a", "static T=c"]


def test_no_more_settings_are_tried_than_the_static_grid_has():
    assert len(records_study.static_grid()) >= 20
    assert len(records_study.tried()) <= len(records_study.static_grid())
    assert len(sums_study.STATIC) >= 20
    assert all(len(tried) <= len(sums_study.STATIC) for tried in sums_study.families().values())


def test_heads_of_the_v_curve_descend_the_label_free_loss():
    """Its slope and its minimiser, from the grid, beside the loss itself."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 300, generator=g) * torch.linspace(0.5, 8, 60)[:, None]
    T = (torch.rand(60, generator=g) * 2).requires_grad_()
    options = {"min_p": 0.05, "gravity": v_curve.GRAVITY, "reduction": "sum"}
    nucleus_width_loss(T, logits, **options).backward()
    mass, gap = v_curve.masses(logits, 0.9)
    torch.testing.assert_close(gap, _gap_of_mass(logits - logits.amax(-1, keepdim=True), 0.9))
    grid = {"min_p": 0.05, "limit": 2.0}
    differ = (v_curve.slope(T.detach(), mass, **grid) - T.grad).abs()
    assert differ.mean() < 0.01
    other = (v_curve.slope(T.detach(), mass, min_p=0.3, limit=2.0) - T.grad).abs()  # the control
    assert other.mean() > 0.1
    best = v_curve.minimiser(mass, **grid)
    at, above, below = (
        nucleus_width_loss((best + d).clamp(min=0), logits, **{**options, "reduction": "none"})
        for d in (0.0, 0.1, -0.1)
    )
    assert (at <= above + 2e-3).all()
    assert (at <= below + 2e-3).all()


def test_answers_that_were_cut_off_have_no_end(model, tmp_path):
    """Whose data are the tokens that were drawn, ended or not."""
    turn, answer = "w3 {{ m.content }} <s> w4 ", "w3 "
    folder, tokenizer = chat_model(model, tmp_path / "model", turn=turn, answer=answer)
    found = wishes.answers(tmp_path, "a", str(folder), [f"w{k}" for k in range(5, 45)])
    assert {example["truncated"] for example in found} == {True, False}
    lines = (tmp_path / "a-drawn.jsonl").read_text().splitlines()
    for example, line in zip(found, map(json.loads, lines), strict=True):
        drawn = [y for y in line["labels"] if y not in (-100, 0)]  # <unk> is no text
        targets = [y for y in encode(tokenizer, example, 1000).labels if y != -100]
        assert targets == drawn
        assert example["truncated"] == (drawn[-1] != 1)


def test_what_wordings_do_to_answers():
    """T of ten wordings and two answers of two tokens: it follows the wish in one of them."""
    count, wordings = 2, len(wishes.KINDS)
    document = torch.arange(wordings * count).repeat_interleave(2)
    tokens = ScanTokens.none(4)
    tokens.document = document
    answers = wishes.Answers(tokens, count)
    sign = {"less": -0.1, "more": 0.1}
    moved = [sign.get(wishes.KINDS[d // count], 0.0) * (d % count == 0) for d in document.tolist()]
    found, by_kind = wishes.shifts(1.0 + np.array(moved), answers)
    assert found["temperature_without_wish"] == pytest.approx(1.0)
    assert found["less_moved"] == found["more_moved"] == found["ordered"] == 0.5
    assert found["less_shift"] == pytest.approx(-0.05)
    assert found["other_shift"] == pytest.approx(0.0)
    assert found["by_wording"][wishes.texts.LESS[0]]["fell"] == 0.5
    assert by_kind["more"].shape == (len(wishes.texts.MORE), count)


def test_wordings_that_measure_are_not_those_that_teach():
    taught = {*package_wishes.LESS, *package_wishes.MORE}
    assert not taught & {*wishes.texts.LESS, *wishes.texts.MORE, *wishes.texts.OTHER}
    assert not set(wishes.texts.TRAIN.all()) & set(wishes.texts.TEST.all())


def test_errors_over_those_of_another_policy():
    errors = np.array([[0.2, 1.0], [0.1, 1.0], [0.3, 1.0]])
    found = frontier.over(errors, np.array([[0.4, 1.0]] * 3))
    assert found["ratio"] == pytest.approx(0.5)
    assert found["ratio_95"] == pytest.approx([0.2625, 0.7375])


def test_what_was_chosen_is_held_against_static_settings_and_autodeco(tmp_path):
    half, few = [" 1}", "x"] * 4, [" 1}"] * 7 + ["x"]
    samples = {
        "static T=1": half,
        "head=/h/autodeco-seed0": ["x"] * 8,
        "head=/h/rewards-seed0": few,
    }
    names = {"static": "static T=1", "autodeco": "head=autodeco", "rewards": "head=rewards"}
    study = frontier.read([evaluation(tmp_path / "e", samples)])
    found = {one["variant"]: one for one in sums_study.against(study, names)}
    assert found["head=rewards"]["chosen_of"] == "rewards"
    assert found["head=rewards"]["over_static"]["ratio"] == pytest.approx(0.25)
    assert found["head=rewards"]["over_autodeco"]["ratio"] == pytest.approx(0.125)
    assert "over_static" not in found["static T=1"]
