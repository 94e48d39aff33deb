"""Instructions that code can verify, in the manner of IFEval (arXiv 2311.07911): `checks` of a
prompt maps names of this table to what they ask for."""

import re
from collections.abc import Callable

_BULLET = re.compile(r"^\s*(?:[*+-]|•|\d+[.)])\s+\S", re.MULTILINE)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_texts(value: object) -> bool:
    return _is_text(value) or (
        isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))
    )


def _is_true(value: object) -> bool:
    return value is True


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _sentences(text: str) -> int:
    return len(re.findall(r"[^.!?]*[^.!?\s][^.!?]*(?:[.!?]+|$)", text))


# name → (whether a text does what is asked, whether that can be asked, what can be)
CHECKS: dict[str, tuple[Callable, Callable, str]] = {
    "min_words": (lambda text, n: len(text.split()) >= n, _is_count, "a count"),
    "max_words": (lambda text, n: len(text.split()) <= n, _is_count, "a count"),
    "sentences": (lambda text, n: _sentences(text) == n, _is_count, "a count"),
    "lines": (lambda text, n: len(text.splitlines()) == n, _is_count, "a count"),
    "bullets": (lambda text, n: len(_BULLET.findall(text)) == n, _is_count, "a count"),
    "contains": (
        lambda text, words: all(w.casefold() in text.casefold() for w in _texts(words)),
        _are_texts,
        "text, or a list of texts",
    ),
    "excludes": (
        lambda text, words: not any(w.casefold() in text.casefold() for w in _texts(words)),
        _are_texts,
        "text, or a list of texts",
    ),
    "starts_with": (lambda text, start: text.startswith(start), _is_text, "text"),
    "ends_with": (lambda text, end: text.endswith(end), _is_text, "text"),
    "no_commas": (lambda text, _: "," not in text, _is_true, "true"),
    "lower_case": (lambda text, _: text == text.lower(), _is_true, "true"),
    "upper_case": (lambda text, _: text == text.upper(), _is_true, "true"),
}


def complaint(asked: object) -> str | None:
    """What is wrong with the `checks` of a prompt, or None."""
    if not isinstance(asked, dict) or not asked:
        return "checks must map names of checks to what they ask for"
    for name, value in asked.items():
        if name not in CHECKS:
            return f"checks must be of {', '.join(CHECKS)}, got {name!r}"
        _, can_ask, what = CHECKS[name]
        if not can_ask(value):
            return f"checks: {name} must be {what}, got {value!r}"
    return None


def share_met(text: str, asked: dict) -> float:
    """The share of the checks that a text meets; space around it does not count. An empty text
    meets none."""
    text = text.strip()
    if not text:
        return 0.0
    return sum(CHECKS[name][0](text, value) for name, value in asked.items()) / len(asked)
