"""No kernel reads or writes an element that is not of its arguments, whatever the shapes."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.memory_guard import guarded
from tests.on_device import DEVICE
from tests.op_cases import CASES, tensors

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="looks into Triton's interpreter")


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows that are further apart, the last one at the end of its store."""
    if x.dim() != 2:
        return x
    store = torch.zeros(x.shape[0], x.shape[1] + 8, dtype=x.dtype)
    store[:, 8:] = x
    return store[:, 8:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_kernels_stay_inside(op, dtype):
    given = {name: apart(x) for name, x in tensors(5, dtype).items()}
    with guarded() as seen:
        CASES[op][1](given, backend="triton")
    assert seen.launches > 0
    assert seen.elements > 0


@triton.jit
def _reads_beyond(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o <= n), mask=o < n)


@triton.jit
def _writes_beyond(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n), mask=o <= n)


@triton.jit
def _updates_beyond(x_ptr, y_ptr, n, block: tl.constexpr):
    o = tl.arange(0, block)
    tl.atomic_add(y_ptr + o, tl.load(x_ptr + o, mask=o < n), mask=o <= n)


def test_the_checker_sees_one_element_too_many():
    """The control; the padding between rows is outside, too."""
    x, y = torch.ones(5), torch.zeros(8)[:5]
    kernels = {_reads_beyond: "reads", _writes_beyond: "writes", _updates_beyond: "updates"}
    for kernel, words in kernels.items():
        with guarded(), pytest.raises(InterpreterError, match=f"{words} 1 elements outside"):
            kernel[(1,)](x, y, 5, 8)
    with guarded() as seen:
        _reads_beyond[(1,)](x, y, 4, 8)
    assert (seen.launches, seen.elements) == (1, 9)
