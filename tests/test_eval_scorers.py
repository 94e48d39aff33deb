"""Scorers on what models write, and on what nobody should."""

import json
import sys
import threading

import numpy as np
import pytest
import torch

from autodeco_fast.training import scorers
from autodeco_fast.training.eval_checks import CHECKS
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.scorers import load_scorer, of_function, parse_record, read_answer

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "x" * 5_000_000


def score(name: str, completion: str, **fields) -> float:
    scorer = load_scorer(name)
    prompt = Prompt(1, {"prompt": "p", **fields})
    scorer.check([prompt])
    return scorer.scores([prompt], [completion])[0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (" Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris!", "Paris", 0.0),
        ("Lutetia", ["Paris", "Lutetia"], 1.0),
        ("", "Paris", 0.0),
        (HUGE, "Paris", 0.0),
    ],
    ids=range(6),
)
def test_exact(completion, answer, expected):
    assert score("exact", completion, answer=answer) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("So it is \\boxed{\\frac{1}{2}}.", "1/2", 1),
        ("First \\boxed{3}, no: \\boxed{4}", "4", 1),
        ("\\boxed{4} #### 5", "4", 1),  # a box wins
        ("9 + 9 = 18, and 18 - 1 = 17\n#### 17", 17, 1),
        ("#### 17\nThat was 12 steps.", "17", 1),
        ("#### 1,234", "1234", 1),
        ("The answer is 42.", "42", 1),
        ("Of 41 and 43 the answer is 42", 42, 1),
        ("0.5", "1/2", 1),
        ("$x^2 + 2x + 1$", "$(x+1)^2$", 1),
        ("#### 18", "17", 0),
        ("\\boxed{", "17", 0),
        ("\\boxed{\\frac{1}{0}}", "17", 0),
        ("nothing", "17", 0),
        ("", "17", 0),
        ("NaN", "17", 0),
        ("(" * 5000, "17", 0),
        (HUGE + " 17", "17", 1),
        ("17 " + HUGE, "17", 0),
    ],
    ids=range(19),
)
def test_math(completion, answer, expected):
    assert score("math", completion, answer=answer) == expected


def test_math_that_takes_too_long_is_wrong(monkeypatch):
    monkeypatch.setattr(scorers, "_SECONDS", 1)
    assert score("math", "$9^{9^{9^{9}}}$", answer="17") == 0


def test_math_takes_gold_answers_as_gsm8k_writes_them():
    assert score("math", "#### 72", answer="48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72")


def test_math_works_in_a_thread():
    """Where math-verify's alarm does not."""
    found = []
    thread = threading.Thread(target=lambda: found.append(read_answer("\\boxed{7}")))
    thread.start()
    thread.join()
    assert found == [[7, "7"]]


@pytest.mark.parametrize(
    ("completion", "valid"),
    [
        ('{"a": 1, "b": "x"}', True),
        (' \n{"b": null, "a": [1, {"c": 2}]} \n', True),
        ('{"a": 1}', False),
        ('{"a": 1, "b": 2, "c": 3}', False),
        ('{"a": 1, "b": 2} and so on', False),
        ('{"a": 1, "b": 2}{"a": 1, "b": 2}', False),
        ('{"a": 1, "a": 2, "b": 3}', False),
        ('{"a": {"c": 1, "c": 2}, "b": 3}', False),
        ('{"a": NaN, "b": 1}', False),
        ('{"a": -Infinity, "b": 1}', False),
        ('{"a": 1e999, "b": 1}', False),
        ('{"a": ' + "9" * 10_000 + ', "b": 1}', False),
        ('{"a": ' + DEEP + ', "b": 1}', False),
        ('{"a": "\ud800", "b": 1}', True),
        ('["a", "b"]', False),
        ("'a'", False),
        ("", False),
        (HUGE, False),
        ('{"a": "' + HUGE + '", "b": 1}', True),
    ],
    ids=range(19),
)
def test_json(completion, valid):
    assert score("json", completion, keys=["a", "b"]) == valid


def test_json_of_the_first_line_only():
    text = ' {"a": 1}\n{"a": 2}\n'
    assert score("json", text, keys=["a"]) == 0
    assert score("json", text, keys=["a"], first_line=True) == 1
    assert score("json", "", keys=["a"], first_line=True) == 0


def test_a_line_of_json_ends_with_the_line_and_not_within_a_text():
    """Unicode's other ends of lines may stand in JSON's texts."""
    for sign in "\u2028\u2029\x85":
        assert score("json", f'{{"a": "x{sign}y"}}\r\nmore', keys=["a"], first_line=True) == 1


def test_records_are_the_same_in_any_order_and_spacing():
    scorer, fields = load_scorer("json"), {"keys": ["a", "b"]}
    one, other = '{"a": 1, "b": {"x": 1, "y": 2}}', '{ "b":{"y":2,"x":1},"a":1 }'
    assert scorer.canonical(one, fields) == scorer.canonical(other, fields)
    assert scorer.canonical(one, fields) != scorer.canonical('{"a": "1", "b": 1}', fields)
    assert parse_record(one, fields) == {"a": "1", "b": '{"x": 1, "y": 2}'}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("red", 1), (" Red. ", 1), ("“RED!”", 1), ("ｒｅｄ", 1), ("dark  blue", 1), ("reddish", 0),
     ("red blue", 0), ("", 0), ("...", 0), (HUGE, 0)],
    ids=range(10),
)  # fmt: skip
def test_choice(completion, expected):
    assert score("choice", completion, allowed=["red", "Dark Blue"]) == expected


@pytest.mark.parametrize("answer", ["C++", "C#", "-5", "5%", "+5", ".5", "$5", "@a", "x²/", "C*"])
def test_a_choice_keeps_signs_that_mean_something(answer):
    bare = "".join(c for c in answer if c.isalnum())
    assert score("choice", f' ("{answer.lower()}".)\n', allowed=[answer])
    assert not score("choice", bare, allowed=[answer])
    assert not score("choice", answer, allowed=[bare])


def test_choices_of_nothing_but_marks_differ():
    assert score("choice", " ? ", allowed=["?"])
    assert not score("choice", "!", allowed=["?"])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("¿red?", 1), ("[red];", 1), ("«red»…", 1), ("「red」。", 1), ("'Red',", 1), ("*red*", 0)],
)
def test_a_choice_may_stand_in_quotes_brackets_and_sentences(completion, expected):
    assert score("choice", completion, allowed=["red"]) == expected


@pytest.mark.parametrize(
    ("checks", "meets", "fails"),
    [
        ({"min_words": 3}, "one two three", "one two"),
        ({"max_words": 3}, "one two three", "one two three four"),
        ({"sentences": 2}, "One. Two!", "One. Two! Three"),
        ({"lines": 2}, "one\ntwo", "one"),
        ({"bullets": 2}, "- a\n* b", "- a\n-b"),
        ({"bullets": 3}, "1. a\n2) b\n• c", "a\nb\nc"),
        ({"contains": ["Sun", "moon"]}, "moon and sun", "sun"),
        ({"excludes": "sun"}, "moon", "a Sunday"),
        ({"starts_with": "Dear"}, "Dear all", "dear all"),
        ({"ends_with": "Bye."}, "Well. Bye.\n", "Bye. Well."),
        ({"no_commas": True}, "a b", "a, b"),
        ({"lower_case": True}, "straße 1", "Straße"),
        ({"upper_case": True}, "A 1", "a"),
    ],
)
def test_checks(checks, meets, fails):
    assert score("checks", meets, checks=checks) == 1
    assert score("checks", fails, checks=checks) == 0
    assert score("checks", " ", checks=checks) == 0


def test_every_check_is_tested_and_counts_alike():
    tested = {name for mark in test_checks.pytestmark for checks, *_ in mark.args[1]
              for name in checks}  # fmt: skip
    assert tested == set(CHECKS)
    assert score("checks", "one, two", checks={"no_commas": True, "max_words": 2}) == 0.5
    assert score("checks", HUGE, checks={"max_words": 1, "sentences": 1, "bullets": 0}) == 1


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("exact", {}, "answer is missing"),
        ("exact", {"answer": 3}, "answer must be text, or a list of texts"),
        ("exact", {"answer": []}, "answer must be text"),
        ("math", {}, "answer is missing"),
        ("math", {"answer": True}, "answer must be text or a number"),
        ("math", {"answer": "none"}, "answer must be one that math-verify reads, got 'none'"),
        ("json", {}, "keys is missing"),
        ("json", {"keys": "ab"}, "keys must be a list of texts"),
        ("json", {"keys": ["a"], "first_line": 1}, "first_line must be true or false"),
        ("choice", {"allowed": [1]}, "allowed must be a list of texts"),
        ("checks", {}, "checks is missing"),
        ("checks", {"checks": {}}, "checks must map names"),
        ("checks", {"checks": {"rhymes": True}}, "checks must be of min_words, "),
        ("checks", {"checks": {"min_words": "3"}}, "checks: min_words must be a count, got '3'"),
        ("checks", {"checks": {"no_commas": False}}, "checks: no_commas must be true"),
    ],
)
def test_what_a_prompt_lacks_is_said_with_its_line(name, fields, words):
    prompts = [Prompt(7, {"prompt": "p", **fields})]
    with pytest.raises(ValueError, match=r"^prompts, line 7: ") as caught:
        load_scorer(name).check(prompts)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# A user's function


def user(function, completions=("a", "b"), **fields):
    scorer = of_function(function, "m:f")
    prompts = [Prompt(n + 1, {"prompt": f"p{n}", **fields}) for n in range(len(completions))]
    scorer.check(prompts)
    return scorer.scores(prompts, completions)


def test_a_function_gets_what_it_names_as_trl_gives_it():
    def named(completions, answer, other=3):
        assert other == 3
        return [c == a for c, a in zip(completions, answer)]

    def everything(prompts, completions, **fields):
        assert prompts == ["p0", "p1"]
        assert fields == {"answer": ["a", "a"]}
        return np.array([0.5, 2.0])

    assert user(named, answer="a") == [1.0, 0.0]
    assert user(everything, answer="a") == [0.5, 2.0]
    assert user(lambda completions: torch.tensor([1, -1])) == [1.0, -1.0]


def test_a_chat_is_given_as_messages():
    def said(prompts, completions):
        return [len(p[0]["content"]) + len(c[0]["content"]) for p, c in zip(prompts, completions)]

    prompt = Prompt(1, {"messages": [{"role": "user", "content": "abc"}]})
    assert of_function(said, "m:f").scores([prompt], ["de"]) == [5.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions: 1 / 0, "scorer 'm:f' failed: ZeroDivisionError: division by zero"),
        (
            lambda completions: [1.0],
            "scorer 'm:f' must return a number for each of 2 completions, got 1",
        ),
        (lambda completions: [1.0, float("nan")], "must return finite numbers, got nan for line 2"),
        (lambda completions: [1.0, None], "must return finite numbers, got None for line 2"),
        (lambda completions: ["x", "y"], "must return finite numbers, got 'x' for line 1"),
        (
            lambda completions: None,
            "scorer 'm:f' must return a list of numbers, one a completion, got None",
        ),
        (lambda completions: "12", "must return a list of numbers, one a completion, got '12'"),
        (lambda completions: 1.0, "must return a list of numbers, one a completion, got 1.0"),
        (lambda completions, gold: [1, 1], "line 1: gold is missing (scorer m:f)"),
    ],
)
def test_a_function_that_fails_is_one_line(function, words):
    with pytest.raises(ValueError) as caught:
        user(function)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_of_a_users_file_that_failed_is_named(tmp_path):
    """The last that is in it: of what it calls, not of json's; of a generator's body, too."""
    (tmp_path / "sc.py").write_text(
        "import json\n\ndef read(text):\n    return json.loads(text)\n\n"
        "def boom(completions):\n    return [read(c) for c in completions]\n\n"
        "def late(completions):\n    yield 1.0\n    raise KeyError('k')\n\n"
        "class Scores:\n    def __call__(self, completions):\n        return 1 / 0\n\n"
        "scores = Scores()\n"
    )
    prompts = [Prompt(1, {"prompt": "p"})]
    for name, line in {"boom": 4, "late": 11, "scores": 15}.items():
        with pytest.raises(ValueError, match=rf" \(sc\.py, line {line}\)$"):
            load_scorer(f"{tmp_path / 'sc.py'}:{name}").scores(prompts, ["["])
    with pytest.raises(ValueError, match=r"positional argument: 'obj'$"):  # before its first line
        of_function(json.dumps, "m:f").scores(prompts, ["["])


def test_a_function_is_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text("def two(completions): return [2.0 for _ in completions]")
    monkeypatch.chdir(tmp_path)
    scorer = load_scorer("my_rules:two")
    assert scorer.scores([Prompt(1, {"prompt": "p"})], ["x"]) == [2.0]
    assert load_scorer(f"{tmp_path / 'my_rules.py'}:two").scores([], []) == []
    (tmp_path / "broken_rules.py").write_text("import nothing_like_it")
    for name, words in {
        "my_rules:three": "my_rules has no function three",
        "broken_rules:x": "cannot be imported: ModuleNotFoundError: No module named 'nothing_like",
        "no_such_module:x": "cannot be imported: ModuleNotFoundError",
        "my_rules:__doc__": "my_rules has no function __doc__",
        "rubbish": "must be one of exact, math, boxed, json, choice, checks or module:function",
        ":x": "must be like module:function",
    }.items():
        with pytest.raises(ValueError, match=r"^scorer ") as caught:
            load_scorer(name)
        assert words in str(caught.value)


def test_a_file_may_hold_dataclasses_and_import_its_neighbours(tmp_path, monkeypatch):
    """As when Python runs it; what stands in the working directory is found, too."""
    there, here, before = tmp_path / "there", tmp_path / "here", list(sys.path)
    there.mkdir()
    here.mkdir()
    (there / "neighbour_of_rules.py").write_text("def value():\n    return 2.0\n")
    (there / "late_neighbour.py").write_text("ADDED = 2.0\n")
    (here / "rules_of_here.py").write_text("LEAST = 1.0\n")
    (there / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from neighbour_of_rules import value\nfrom rules_of_here import LEAST\n"
        "@dataclass\nclass Found:\n    x: float\n"
        "def f(completions):\n    from late_neighbour import ADDED\n"
        "    return [Found(value() - LEAST).x + ADDED for _ in completions]\n"
    )
    monkeypatch.chdir(here)
    assert load_scorer("../there/json.py:f").scores([Prompt(1, {"prompt": "p"})], ["x"]) == [3.0]
    assert sys.path == before
    assert sys.modules["json"] is json
    (there / "broken.py").write_text(
        "import sys\nmine = __name__\nassert mine in sys.modules\n1 / 0"
    )
    known = set(sys.modules)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_scorer("../there/broken.py:f")
    assert set(sys.modules) == known


def test_another_text_of_the_function_is_another_scorer(tmp_path):
    path = tmp_path / "rules.py"
    seen = set()
    for number in (1, 2):
        path.write_text(f"def f(completions):\n    return [{number}] * len(completions)\n")
        seen.add(load_scorer(f"{path}:f").identity)
    assert len(seen) == 2
    assert load_scorer("json").identity == "json"
    assert of_function(json.loads, "json:loads").identity.startswith("json:loads ")
    assert of_function(len, "builtins:len").identity == "builtins:len"
