"""An option is written once: a dataclass field that carries its help and what it may be.

From it come the check, the documentation, the key in YAML and the command line's option
(`cli/signature.py`). Imports nothing heavy: the command line shows the defaults.
"""

import functools
import inspect
import operator
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from autodeco_fast.urls import Location, location
from autodeco_fast.values import SEEDS, finite, require, whole

_LARGEST = 2**63 - 1
_LARGEST_FLOAT = 1e30  # products with it stay finite in single precision
_SIZES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TYPE_WORDS = {
    bool: "true or false",
    str: "text",
    Path: "a path",
    Location: "a path or a URL",
}
_RANGES: dict[str, Callable[[float], bool]] = {
    "≥ 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "at least 2": lambda x: x >= 2,
    "0 or 1": lambda x: x in (0, 1),
    "1 or 2": lambda x: x in (1, 2),
    "positive": lambda x: x > 0,
    "in (0, 1)": lambda x: 0 < x < 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
}


def option(
    help: str,
    default: object = MISSING,
    *,
    must_be: str = "",
    choices: Sequence[str] = (),
    is_size: bool = False,
) -> Any:
    """A field of a dataclass that is an option.

    Args:
        help: a phrase: what the option is; its range and default are added where it is shown.
        must_be: the range of a number, one of `_RANGES`, in the words of the complaint.
        choices: the texts that are allowed.
        is_size: a number of bytes, which a text like 2G may stand for.
    """
    assert not must_be or must_be in _RANGES, must_be
    metadata = {
        "help": help,
        "must_be": "one of " + ", ".join(choices) if choices else must_be,
        "allows": choices.__contains__ if choices else _RANGES.get(must_be),
        "is_size": is_size,
    }
    return field(default=default, metadata=metadata)


def option_of(options: type, name: str) -> Any:
    """The option of another dataclass, for one that has it too."""
    found = next(each for each in fields(options) if each.name == name)
    return field(default=found.default, metadata=found.metadata)


def size(text: str) -> int:
    """Bytes: a number, or one with k, M, G or T."""
    number, factor = (text[:-1], _SIZES[text[-1]]) if text[-1:] in _SIZES else (text, 1)
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):  # not a number; infinite
        raise ValueError(
            f"a size must be a number of bytes like 500M or 2G, got {text!r}"
        ) from None


def type_of(option: Field) -> tuple[type, bool]:
    """The type of an option, or of each of a list, and whether it may be None."""
    alternatives = typing.get_args(option.type) or (option.type,)
    found = [each for each in alternatives if each not in (types.NoneType, ...)]
    return functools.reduce(operator.or_, found), types.NoneType in alternatives


def is_list(option: Field) -> bool:
    """Whether an option may be given several times: a tuple of values of its type."""
    return typing.get_origin(option.type) is tuple


def help_of(option: Field) -> str:
    """What an option is and what it must be."""
    expected = option.metadata["must_be"]
    return option.metadata["help"] + (f"; must be {expected}" if expected else "")


def listed(options: type) -> list[Field]:
    """The options of a dataclass for the eye: those it shares with other dataclasses come last."""
    new = inspect.get_annotations(options)
    return sorted(fields(options), key=lambda field: field.name not in new)


def from_text(option: Field, text: str) -> object:
    """What a text stands for: YAML reads 1e-3 and 2G as texts."""
    option_type, _ = type_of(option)
    if option_type is Path:
        return Path(text)
    if option_type == Location:
        return location(text)
    if option_type not in (int, float):
        return text
    try:
        return size(text) if option.metadata["is_size"] else option_type(text)
    except ValueError:
        return text  # refused by name, with whatever else is wrong


def _typed(option: Field, value: object) -> object:
    """The value as its type says; a number becomes Python's."""
    option_type, optional = type_of(option)
    name = option.name
    if value is None and optional:
        return None
    if is_list(option):
        several = isinstance(value, (list, tuple))
        fits = several and all(isinstance(each, option_type) for each in value)
        require(fits, name, value, f"a list, each {_TYPE_WORDS[option_type]}")
        return tuple(value)
    if option_type is int:
        return whole(name, value, *(SEEDS if name == "seed" else (-_LARGEST - 1, _LARGEST)))
    if option_type is float:
        value = finite(name, value)
        require(abs(value) <= _LARGEST_FLOAT, name, value, f"at most {_LARGEST_FLOAT:g}")
        return value
    if option_type == Location and isinstance(value, str):
        return location(value)
    expected = _TYPE_WORDS.get(option_type) or f"a {option_type.__name__}"
    require(isinstance(value, option_type), name, value, expected)
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that are checked when they are made.

    Raises:
        ValueError: naming the first that is of another type, else the first that is out of range.
    """

    def __post_init__(self):
        for each in fields(self):
            object.__setattr__(self, each.name, _typed(each, getattr(self, each.name)))
        for each in fields(self):
            value, allows = getattr(self, each.name), each.metadata["allows"]
            if allows is not None and value is not None:
                require(allows(value), each.name, value, each.metadata["must_be"])


def documented(options: type) -> type:
    """Adds the options of a dataclass to its docstring, as its arguments."""
    if sys.flags.optimize == 2:  # there are no docstrings
        return options
    lines = [inspect.cleandoc(options.__doc__), "", "Args:"]
    for each in listed(options):
        default = "" if each.default is MISSING else f"; by default {each.default!r}"
        text = f"{each.name}: {help_of(each)}{default}."
        lines += textwrap.wrap(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
    options.__doc__ = "\n".join(lines) + "\n"
    return options
