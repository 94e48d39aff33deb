"""Functions of a user's own, by name: reward functions and scorers."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from autodeco_fast.errors import foreign


def load_function(name: str, spec: str) -> Callable:
    """The function that `module:function` or `file.py:function` names.

    A module is looked for in the working directory, too.

    Args:
        name: of the setting, for complaints.

    Raises:
        ValueError: if there is none, or its module cannot be imported.
    """
    where, _, function = spec.rpartition(":")
    if not (where and function):
        raise ValueError(f"{name} must be module:function or file.py:function, got {spec!r}")
    with foreign(f"{name} {spec!r} cannot be imported"):
        found = getattr(_of_file(where) if where.endswith(".py") else _of_name(where), function)
    if not callable(found):
        raise ValueError(f"{name} {spec!r} must be a function, got {type(found).__name__}")
    return found


def _of_name(module: str) -> ModuleType:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _of_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
