"""Copies and pickles of an attached model: plain, unattached models."""

import copy
from collections import OrderedDict

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
COMPILED = ("_compiled_call", "_last_compile_config")  # what transformers compiles, of one model


def plain_copy(
    model: nn.Module, base: type, *, modules: list[nn.Module], hooks: set[int], memo: dict
) -> nn.Module:
    """`copy.deepcopy(model, memo)` as an instance of `base`, without the hooks of these ids.

    What the memo knows is not copied: so hooks are left out by giving the copies' tables in
    advance, and nothing of the original has to change meanwhile.

    Args:
        modules: those that have such hooks.
    """
    for module in modules:
        for name in _HOOKS:
            table = getattr(module, name)
            others = {key: hook for key, hook in table.items() if key not in hooks}
            memo[id(table)] = OrderedDict(copy.deepcopy(others, memo))
    new = base.__new__(base)
    memo[id(model)] = new
    state = {name: value for name, value in model.__getstate__().items() if name not in COMPILED}
    new.__dict__.update(copy.deepcopy(state, memo))
    return new


def shared_tensors(model: nn.Module) -> dict:
    """A memo under which a copy shares all parameters and buffers, as a pickle would."""
    tensors = [*model.parameters(), *model.buffers()]
    return {id(t): t for t in tensors}
