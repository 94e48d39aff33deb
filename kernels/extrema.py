"""The larger and the smaller of two numbers, NaN where one is.

`tl.maximum` alone is a GPU's `max`, which leaves NaN out, so that what is broken would look whole.
On NVIDIA's GPUs these are one instruction, too, `max.NaN`.
"""

import triton
import triton.language as tl


@triton.jit
def at_least(b_x, low):
    return tl.maximum(b_x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(b_x, high):
    return tl.minimum(b_x, high, propagate_nan=tl.PropagateNan.ALL)
