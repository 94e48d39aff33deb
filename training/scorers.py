"""Scorers: what a completion is worth, by name or from a user's function.

    name     a prompt's fields                      a completion scores 1 if
    exact    answer: text, or several               it is the answer, but for space around it
    math     answer, or gt: text or a number        its answer is equal, by math-verify: the last
                                                    \\boxed{}, else after the last ####, else the
                                                    last number or formula
    boxed    answer, or gt: text or a number        its last \\boxed{} is equal, by math-verify
    json     keys: list; first_line: true;          it (its first line), after the prefix, is one
             prefix: text                           JSON object with exactly these keys
    choice   allowed: list                          it is one of these, but for case and quotes,
                                                    brackets, sentence marks and space around it
    checks   checks: map, see training/eval_checks  score is the share of checks it meets

`module:function`, or `file.py:function`, is called as TRL calls a reward function, so that one can
serve `train --objective rewards` and this: with the keyword arguments `prompts` (text, or chat
messages), `completions` (likewise: text, or one message) and, for every other field it names (all,
if it takes `**fields`), a list with that field of each prompt. It returns a score for each.
"""

import inspect
import json
import logging
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from autodeco_fast.errors import foreign
from autodeco_fast.training import eval_checks
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.reward_function import Completion, load_function, rewards_of
from autodeco_fast.training.scan_store import fingerprint

_READ_AT_MOST = 20_000  # characters at the end of a completion that an answer is looked for in
_SECONDS = 5  # for one answer


def _collapsed(completion: str, fields: dict) -> str:
    return " ".join(completion.split())


@dataclass(frozen=True)
class Scorer:
    """Scores completions.

    `complaint` says what a prompt's fields lack. Two completions are the same if they have the same
    `canonical` form. `record` gives the values of a valid completion's fields, where it has fields.
    """

    name: str
    scores: Callable[[Sequence[Prompt], Sequence[str]], list[float]]
    complaint: Callable[[dict], str | None]
    canonical: Callable[[str, dict], str] = _collapsed
    record: Callable[[str, dict], dict[str, str] | None] | None = None
    source: str = ""  # of a user's function

    @property
    def identity(self) -> str:
        """Changes when scores may."""
        return f"{self.name} {fingerprint(self.source.encode())}" if self.source else self.name

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError naming the first line that lacks what this scorer needs."""
        for prompt in prompts:
            said = self.complaint(prompt.fields)
            if said:
                raise ValueError(f"prompts, line {prompt.line}: {said} (scorer {self.name})")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))


def _needs(field: str, fits: Callable[[object], bool], expected: str) -> Callable:
    def complaint(fields: dict) -> str | None:
        if field not in fields:
            return f"{field} is missing"
        return None if fits(fields[field]) else f"{field} must be {expected}"

    return complaint


def _each(score: Callable[[str, dict], float]) -> Callable:
    """Scores of single completions."""

    def scores(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return [float(score(c, p.fields)) for p, c in zip(prompts, completions)]

    return scores


# exact


def _exact(completion: str, fields: dict) -> bool:
    answers = fields["answer"] if isinstance(fields["answer"], list) else [fields["answer"]]
    return completion.strip() in {answer.strip() for answer in answers}


# choice


_PAIRED = {"Pi", "Pf", "Ps", "Pe"}  # Unicode's categories of quotes and brackets
_SENTENCE_ENDS = ".,;:!?。、।؟،؛"


def _plain(text: str) -> str:
    """Without case, accents' encodings, runs of space, and quotes, brackets and sentence marks
    around it; signs like those of C++, -5 and 5% are its own."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    around = " " + "".join(
        c for c in set(text) if c in "\"'`" or unicodedata.category(c) in _PAIRED
    )
    return text.lstrip(around + "¿¡").rstrip(around + _SENTENCE_ENDS) or text


def _choice(completion: str, fields: dict) -> bool:
    return _plain(completion) in set(map(_plain, fields["allowed"]))


# json


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def parse_record(completion: str, fields: dict) -> dict[str, str] | None:
    """The values of a completion that is one JSON object with exactly `keys`, each as JSON; None of
    any other. NaN, infinities and repeated keys are no JSON here."""
    if fields.get("first_line"):
        completion = completion.strip().partition("\n")[0]  # JSON's texts may hold U+2028
    completion = fields.get("prefix", "") + completion
    try:
        found = json.loads(completion, parse_constant=_refuse, object_pairs_hook=_without_repeats)
        if not isinstance(found, dict) or set(found) != set(fields["keys"]):
            return None
        return {
            key: json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
            for key, value in found.items()
        }
    except (ValueError, RecursionError):  # no JSON, a number too long or too large; too deep
        return None


def _canonical_record(completion: str, fields: dict) -> str:
    record = parse_record(completion, fields)
    if record is None:
        return _collapsed(completion, fields)
    return json.dumps(record, sort_keys=True, ensure_ascii=False)


def _json_complaint(fields: dict) -> str | None:
    first_line = fields.get("first_line", False)
    if not isinstance(first_line, bool):
        return "first_line must be true or false"
    if not isinstance(fields.get("prefix", ""), str):
        return "prefix must be text"
    return _needs("keys", _are_texts, "a list of texts")(fields)


# math


def _math_verify():
    try:
        import math_verify
    except ImportError:
        raise ValueError(
            "scorers math and boxed need math-verify: pip install 'autodeco-fast[eval]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # a timeout is a wrong answer
    return math_verify


def _timeout() -> int | None:
    """math-verify's alarm works in the main thread alone."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None


def read_answer(text: str) -> list:
    """The answer at the end of a text, as math-verify reads it; empty if there is none.

    Looked for in the last 20,000 characters.
    """
    library, text = _math_verify(), text[-_READ_AT_MOST:]
    box = text.rfind("\\boxed")
    if box >= 0:
        text = text[box:]  # several would be read as a set
    elif "####" in text:
        text = next(iter(text.rpartition("####")[2].strip().splitlines()), "")
    # Bare numbers and formulas are read where nothing is in LaTeX.
    how = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]
    return library.parse(text, how, parsing_timeout=_timeout())


def _boxed(completion: str, fields: dict) -> bool:
    return "\\boxed" in completion[-_READ_AT_MOST:] and _math(completion, fields)


def _math(completion: str, fields: dict) -> bool:
    answer = read_answer(completion)
    if not answer:
        return False
    gold = _gold(str(_answer_field(fields)[1]))
    return _math_verify().verify(list(gold), answer, timeout_seconds=_timeout())


@lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple:
    return tuple(read_answer(answer))


def _answer_field(fields: dict) -> tuple[str, object]:
    """The name of the field that holds the answer, and its value."""
    is_gt = "answer" not in fields and ("gt" in fields or "problem" in fields)
    name = "gt" if is_gt else "answer"
    return name, fields.get(name)


def _math_complaint(fields: dict) -> str | None:
    name, answer = _answer_field(fields)
    if name not in fields:
        return f"{name} is missing"
    if isinstance(answer, bool) or not (_is_text(answer) or isinstance(answer, (int, float))):
        return f"{name} must be text or a number"
    if not _gold(str(answer)):
        return f"{name} must be one that math-verify reads, got {answer!r}"
    return None


_ANSWER = _needs("answer", lambda a: _is_text(a) or _are_texts(a), "text, or a list of texts")
_BUILT_IN = {
    scorer.name: scorer
    for scorer in (
        Scorer("exact", _each(_exact), _ANSWER),
        Scorer("math", _each(_math), _math_complaint),
        Scorer("boxed", _each(_boxed), _math_complaint),
        Scorer(
            "json",
            _each(lambda completion, fields: parse_record(completion, fields) is not None),
            _json_complaint,
            canonical=_canonical_record,
            record=parse_record,
        ),
        Scorer(
            "choice",
            _each(_choice),
            _needs("allowed", _are_texts, "a list of texts"),
            canonical=lambda completion, fields: _plain(completion),
        ),
        Scorer(
            "checks",
            _each(lambda completion, fields: eval_checks.share_met(completion, fields["checks"])),
            lambda fields: (
                eval_checks.complaint(fields["checks"])
                if "checks" in fields
                else "checks is missing"
            ),
        ),
    )
}


def load_scorer(name: str) -> Scorer:
    """The scorer of a name, or of a user's `module:function`.

    Raises:
        ValueError: if there is none.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" not in name:
        raise ValueError(
            f"scorer must be one of {', '.join(_BUILT_IN)} or module:function, got {name!r}"
        )
    return of_function(load_function("scorer", name), name)


def of_function(function: Callable, name: str) -> Scorer:
    """A scorer from a function like those of `train --objective rewards`: see above.

    Its `scores` raise ValueError, naming it, if the function raises, returns another number of
    scores, or one that is no finite number.
    """
    with foreign(f"scorer {name!r} cannot be called"):
        parameters = inspect.signature(function).parameters.values()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in variable}

    def complaint(fields: dict) -> str | None:
        missing = sorted(needed - set(fields) - {"prompts", "completions"})
        return f"{missing[0]} is missing" if missing else None

    def scores(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        names = {name for p in prompts for name in p.fields}
        names -= {"prompt", "messages", "prompts", "completions"}
        return rewards_of(
            function,
            name,
            [p.content for p in prompts],
            [_as_given(p, c) for p, c in zip(prompts, completions)],
            {name: [p.fields.get(name) for p in prompts] for name in sorted(names)},
            name="scorer",
            places=[f"line {p.line}" for p in prompts],
        )

    return Scorer(name, scores, complaint, source=_source(function))


def _as_given(prompt: Prompt, completion: str) -> Completion:
    """A chat's completion is a message, as its prompt is a list of them."""
    if isinstance(prompt.content, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _source(function: Callable) -> str:
    """The text of the file that a function is from, or nothing where it is from none."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # built in, or an object that is called
        return ""
    return Path(path).read_text(errors="replace") if path and Path(path).is_file() else ""
