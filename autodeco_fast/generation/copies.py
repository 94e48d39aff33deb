"""Copies and pickles of what carries our hooks, a model and its output embedding: plain modules."""

import copy
from collections import OrderedDict
from types import MethodType

from torch import nn

_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
COMPILED = ("_compiled_call", "_last_compile_config")  # what transformers compiles, of one model


class NotCopied:
    """Whose methods are hooks that no copy has."""


def _ours(module: nn.Module) -> set[int]:
    """The ids of our hooks on a module."""
    hooks = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
    return {key for key, hook in hooks if isinstance(getattr(hook, "__self__", None), NotCopied)}


def _tables(module: nn.Module) -> dict[str, OrderedDict]:
    """The module's tables of hooks, without ours."""
    ours, tables = _ours(module), {name: getattr(module, name) for name in _TABLES}
    return {
        name: OrderedDict((key, value) for key, value in table.items() if key not in ours)
        for name, table in tables.items()
    }


def plain_state(module: nn.Module) -> dict:
    """What copies and pickles of a module are made of: its state without what is of `attach`."""
    state = {**type(module).__getstate__(module), **_tables(module)}
    return {name: value for name, value in state.items() if name not in (*_METHODS, *COMPILED)}


def _plain_deepcopy(module: nn.Module, memo: dict) -> nn.Module:
    """That of a class with a `__deepcopy__` of its own, as parametrized modules have, which asks
    for no state: what the memo knows is not copied."""
    tables = [(getattr(module, name), table) for name, table in _tables(module).items()]
    memo.update({id(table): OrderedDict() for table, _ in tables})
    new = type(module).__deepcopy__(module, memo)
    for table, plain in tables:
        memo[id(table)].update(copy.deepcopy(plain, memo))
    for name in _METHODS:
        new.__dict__.pop(name, None)
    return new


_METHODS = {"__getstate__": plain_state, "__deepcopy__": _plain_deepcopy}


class CopiedPlain:
    """Until `remove()`, copies and pickles of a module are plain.

    Attributes that stand before the class's methods see to it: others look at its class.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        for name, method in _METHODS.items():
            if hasattr(type(module), name):
                setattr(module, name, MethodType(method, module))

    def remove(self) -> None:
        """To be called when the hooks are gone; another model that shares the module may have its
        own on it."""
        if not _ours(self.module):
            for name in _METHODS:
                self.module.__dict__.pop(name, None)
