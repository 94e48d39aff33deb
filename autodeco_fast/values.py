"""Checks of single values: the name, what came, what was expected, on one line."""

import numbers
import reprlib
import sys

SEEDS = -(2**63), 2**64 - 1  # what torch takes


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {reprlib.repr(value)}")


def whole(name: str, value: object, low: int, high: int) -> int:
    """An integer of Python or numpy in [low, high], as a Python int; a bool is none."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(is_whole and low <= value <= high, name, value, f"an integer in [{low}, {high}]")
    return int(value)


def finite(name: str, value: object) -> float:
    """A finite number of Python or numpy, as a Python float; a bool is none."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(is_number and abs(value) <= sys.float_info.max, name, value, "a finite number")
    return float(value)


def text(name: str, value: str) -> str:
    """A string that is Unicode, without the lone surrogates that JSON and file names can bring."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be Unicode, got a lone surrogate") from None
    return value


def inner_share(name: str, value: object) -> float:
    """A number in (0, 1)."""
    require(0 < finite(name, value) < 1, name, value, "in (0, 1)")
    return float(value)
