"""A user's reward function: found by name, called as TRL calls one, and what it returns checked."""

import importlib
import importlib.util
import inspect
import math
import numbers
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from autodeco_fast.errors import foreign

Completion = str | list[dict]  # a chat's is one message of the assistant


def load_function(name: str, spec: str) -> Callable:
    """The function that `module:function` or `file.py:function` names.

    Modules are looked for in the working directory, too, and beside a file first.

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
        with _importing(where):
            return importlib.import_module(where)
    path = Path(where).resolve()
    name = re.sub(r"\W", "_", str(path))  # no other module's, and no package's
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the names of their types
    try:
        with _importing(where):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _importing(where: str) -> Iterator[None]:
    """Around a module that runs, or a function of it: what stands beside a file and in the working
    directory is found before all else."""
    folders = [str(Path(where).resolve().parent), ""] if where.endswith(".py") else [""]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            with suppress(ValueError):  # a module may change the list, too
                sys.path.remove(folder)


def accepted(function: Callable, given: dict[str, object]) -> dict[str, object]:
    """Those of the keyword arguments that a function takes: all, if it takes `**fields`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {each.name: given[each.name] for each in parameters if each.name in given}


@contextmanager
def _located(function: Callable) -> Iterator[None]:
    """Around a call of a user's function inside `foreign`: where in its file it failed is said."""
    try:
        yield
    except ValueError as error:
        function = inspect.unwrap(function)
        called = function if inspect.isroutine(function) else type(function).__call__
        path = getattr(getattr(called, "__code__", None), "co_filename", None)
        frames = traceback.extract_tb(error.__cause__.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        place = f" ({Path(path).name}, line {lines[-1]})" if lines else ""
        raise ValueError(f"{error}{place}") from error.__cause__


def rewards_of(
    function: Callable,
    spec: str,
    prompts: list[Completion],
    completions: list[Completion],
    columns: dict[str, list],
    *,
    name: str = "reward",
    places: Sequence[str] | None = None,
) -> list[float]:
    """What the function says of completions, a finite number each.

    Args:
        columns: what else the prompts' lines have; the function gets what it names of it.
        name: of the setting, for complaints.
        places: where each prompt stands, likewise.

    Raises:
        ValueError: if it raises, or returns anything else.
    """
    given = {"prompts": prompts, "completions": completions, **columns}
    where = spec.rpartition(":")[0]
    with _importing(where), _located(function), foreign(f"{name} {spec!r} failed"):
        returned = function(**accepted(function, given))
        returned = returned.tolist() if hasattr(returned, "tolist") else returned
        is_list = isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping))
        scores = list(returned) if is_list else returned
    if not is_list:
        raise ValueError(
            f"{name} {spec!r} must return a list of numbers, one a completion, got "
            f"{reprlib.repr(returned)}"
        )
    if len(scores) != len(completions):
        raise ValueError(
            f"{name} {spec!r} must return a number for each of {len(completions)} completions, got "
            f"{len(scores)}"
        )
    for i, score in enumerate(scores):
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            place = f"completion {i}" if places is None else places[i]
            raise ValueError(
                f"{name} {spec!r} must return finite numbers, got {score!r} for {place}"
            )
    return [float(score) for score in scores]
