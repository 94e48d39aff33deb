"""A user's reward function: found by name, called as TRL calls one, and what it returns checked."""

import importlib
import importlib.util
import math
import numbers
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from autodeco_fast.errors import foreign

Completion = str | list[dict]  # a chat's is one message of the assistant


def load_function(name: str, spec: str) -> Callable:
    """The function that `module:function` or `file.py:function` names.

    Modules are looked for in the working directory, too.

    Args:
        name: of the setting, for complaints.

    Raises:
        ValueError: if there is none, or its module cannot be imported.
    """
    where, _, function = spec.rpartition(":")
    if not where or not function.isidentifier():
        raise ValueError(f"{name} must be like module:function or file.py:function, got {spec!r}")
    with foreign(f"{name} {spec!r}: {where} cannot be imported"):
        module = _imported(where)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{name} {spec!r}: {where} has no function {function}")
    return found


def _imported(where: str) -> ModuleType:
    if not where.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(where)
        finally:
            sys.path.remove("")
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewards_of(
    function: Callable,
    spec: str,
    prompts: list[Completion],
    completions: list[Completion],
    columns: dict[str, list],
) -> list[float]:
    """What the function says of completions, a finite number each.

    Raises:
        ValueError: if it raises, or returns anything else.
    """
    with foreign(f"reward {spec!r} failed"):
        returned = function(prompts=prompts, completions=completions, **columns)
        scores = list(returned)
    if len(scores) != len(completions):
        raise ValueError(
            f"reward {spec!r} must return a number for each of {len(completions)} completions, got "
            f"{len(scores)}"
        )
    for i, score in enumerate(scores):
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise ValueError(
                f"reward {spec!r} must return finite numbers, got {score!r} for completion {i}"
            )
    return [float(score) for score in scores]
