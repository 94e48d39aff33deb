"""Differentiable ops where nobody traces."""

from collections.abc import Callable

import torch


def eager(forward: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """A custom op without the dispatcher, which takes longer than a small op.

    Args:
        forward, setup_context, backward: as `torch.library.custom_op` and its `register_autograd`
            take them.
    """

    def run(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    return type("Eager", (torch.autograd.Function,), members).apply
