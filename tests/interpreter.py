"""Triton's interpreter without work that it repeats, and with the maximum of a GPU.

It replaces the functions of `triton.language` not only before a launch but again in every call of a
jitted function inside the kernel, `tl.sum` and `tl.zeros` among them: almost half of the time of a
small kernel. Here it does so once a launch. It also computes whether an integer overflows, and
drops the answer.

`tl.maximum` of NaN and a number is NaN to it, but the number to a GPU, as `tl.max` is to both.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patched: set = set()  # the modules of this launch whose functions are replaced already


@cache
def _languages(function: Callable) -> frozenset:
    """The modules that the interpreter looks for in a function's globals."""
    found = function.__globals__.values()
    return frozenset(m for m in (tl, tl.core) if any(value is m for value in found))


def quicken() -> None:
    """From here on, in this process."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_anew(self, *args, **options):
        _patched.clear()
        return launch(self, *args, **options)

    def patch_new(function: Callable):
        languages = _languages(function)
        if languages and languages <= _patched:  # in a call inside the kernel, which undoes nothing
            return None
        _patched.update(languages)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_new
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    of_a_gpu = {"create_maxnumf": np.fmax, "create_minnumf": np.fmin}
    for name, function in of_a_gpu.items():
        setattr(interpreter.InterpreterBuilder, name, _elementwise(function))
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # overflows are looked for, and only then reported
        builder.options = replace(builder.options, sanitize_overflow=False)


def _elementwise(function: np.ufunc) -> Callable:
    return lambda self, left, right: self.binary_op(left, right, function)


def _remembered(numpy_type: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """By name: types of blocks and of pointers have no hash."""
    known: dict[str, np.dtype] = {}

    def find(dtype: tl.dtype) -> np.dtype:
        if dtype.name not in known:
            known[dtype.name] = numpy_type(dtype)
        return known[dtype.name]

    return find
