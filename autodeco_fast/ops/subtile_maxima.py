"""`subtile_maxima`: the part of `sample` that needs no temperature."""

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.ops.checks import tracing
from autodeco_fast.ops.sample import allowed_tokens, sampled_logits
from autodeco_fast.sampling import SUBTILE


@torch.library.custom_op("autodeco_fast::subtile_maxima", mutates_args=())
def _subtile_maxima(
    logits: torch.Tensor, allowed: torch.Tensor | None, backend: str
) -> torch.Tensor:
    """The op for the tracer."""
    return implementation(backend, "subtile_maxima")(logits, allowed=allowed)


@_subtile_maxima.register_fake
def _(logits, allowed, backend):
    B, V = logits.shape
    return logits.new_empty(B, -(-V // SUBTILE), dtype=torch.float32)


def subtile_maxima(
    logits: torch.Tensor,
    *,
    token_bitmask: torch.Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The largest of every 256 neighbouring logits, for `sample(…, maxima=…)`.

    `sample` takes these itself: its one read of the logits from memory. They do not depend on the
    temperature, so they can be taken while a head computes it, on another stream; or come out of
    the kernel that writes the logits, and then need no read.

    Args:
        logits, token_bitmask, vocab_size, backend: as in `sample`, and the same as there.

    Returns:
        `[B, ⌈V/256⌉]` fp32: entry i of a row is the maximum of its logits 256 i … 256 i + 255 as
        they are stored, the last one of what is left; +inf where one of these is NaN or +inf, −inf
        where none is finite or allowed. Not differentiable.

    Raises:
        ValueError, RuntimeError: as `sample`.
    """
    logits = sampled_logits(logits, vocab_size)
    backend = resolve(backend, logits)
    allowed = allowed_tokens(token_bitmask, logits)
    if tracing(logits):
        return _subtile_maxima(logits, allowed, backend)
    return implementation(backend, "subtile_maxima")(logits, allowed=allowed)
