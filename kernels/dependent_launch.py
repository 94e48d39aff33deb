"""Kernels that start before the one ahead of them ends (programmatic dependent launch; NVIDIA's
GPUs from compute capability 9 on).

    ahead    lets_next_start    at its beginning: once all its programs run, the next may come
    behind   waits              before it looks at memory: until the one ahead has ended and all
                                that it wrote is seen
    between  both

What is saved is the wait for the launch of the one behind. It is safe as long as every kernel that
is launched with `options` waits before its first read and write, and the one ahead of it is either
launched without them, so that it began when all before it had ended, or waits itself: then whatever
was launched before has ended when the wait has. A kernel of somebody else's that comes next waits
for the end of ours, as ever, or by itself if it is launched so, too.

[CUDA programming guide, "Programmatic Dependent Launch and Synchronization"]
"""

import torch
import triton
import triton.language as tl

from .device import capability

TARGETS = ("sm_90", "sm_100")  # of those that kernels are compiled for ahead of time


def dependent(x: torch.Tensor) -> bool:
    """Whether kernels can be launched so where a tensor is."""
    return capability(x) >= (9, 0)


def options(dependent: bool) -> dict[str, bool]:
    """Of the launch of a kernel that waits; other compilers do not know the option."""
    return {"launch_pdl": True} if dependent else {}


@triton.jit
def lets_next_start(dependent: tl.constexpr):
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def waits(dependent: tl.constexpr):
    if dependent:
        tl.extra.cuda.gdc_wait()
