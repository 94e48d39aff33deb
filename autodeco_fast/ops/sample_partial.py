"""Sampling from a vocabulary split over ranks: each finds its candidates, one merges."""

from collections.abc import Sequence

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.ops.checks import (
    PROBABILITY,
    Interval,
    check_device,
    check_integer,
    check_parameter,
    check_tensor,
    readable,
    tracing,
)
from autodeco_fast.ops.sample import (
    TEMPERATURE,
    allowed_tokens,
    checked_parameters,
    sampled_logits,
)
from autodeco_fast.sampling import CANDIDATE, SamplingParameters
from autodeco_fast.vocab_parallel import SamplePartial, merge_candidates

FIRST_ID = Interval(0, 2**31 - 4, "[0, 2**31)")


def _sample_partial(
    logits: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    floats: Sequence[float],
    integers: Sequence[int],
    allowed: torch.Tensor | None,
    first_id: int,
    known_maximum: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate `[3, B]` and token `[B]`, of packed parameters."""
    out = implementation(backend, "sample")(
        logits,
        SamplingParameters.unpacked(tensors, floats, integers),
        allowed=allowed,
        first_id=first_id,
        known_maximum=known_maximum,
        want=CANDIDATE,
    )
    return out.candidate, out.token


_op = torch.library.custom_op("autodeco_fast::sample_partial", _sample_partial, mutates_args=())


@_op.register_fake
def _(logits, tensors, floats, integers, allowed, first_id, known_maximum, backend):
    B = logits.shape[0]
    candidate = logits.new_empty(3, B, dtype=torch.float32)
    return candidate, logits.new_empty(B, dtype=torch.int64)


def _known(maximum: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The checked maxima, contiguous."""
    B = logits.shape[0]
    check_tensor("maximum", maximum)
    if maximum.shape != (B,) or maximum.dtype != torch.float32:
        raise ValueError(
            f"maximum must be [{B}] float32, got {tuple(maximum.shape)} {maximum.dtype}"
        )
    check_device("maximum", maximum, logits)
    if readable(maximum) and not (maximum < float("inf")).all():
        raise ValueError(
            f"maximum must be below inf, got {maximum[~(maximum < float('inf'))][0].item()}"
        )
    return maximum.detach().contiguous()


@torch.no_grad()
def sample_partial(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    first_id: int,
    min_p: float | torch.Tensor | None = 0.0,
    seed: int | torch.Tensor,
    position: int | torch.Tensor = 0,
    stream: int | torch.Tensor | None = None,
    token_bitmask: torch.Tensor | None = None,
    maximum: torch.Tensor | None = None,
    backend: str | None = None,
) -> SamplePartial:
    """What one rank of a vocabulary-parallel server contributes to `merge_samples`.

    Args:
        logits: `[B, V_rank]` of the ids first_id … first_id + V_rank − 1.
        token_bitmask: of this rank's ids.
        first_id: a multiple of 4, in [0, 2³¹).
        maximum: `[B]` fp32 largest logits of the whole vocabulary, if known: with them no row stays
            open.
        temperature, min_p, seed, position, stream, backend: as in `sample`, the same on every rank.

    Raises:
        ValueError: as `sample`, or for a `first_id` that is no multiple of 4, or a maximum that is
            NaN or +inf.
        RuntimeError: as `sample`.
    """
    if check_integer("first_id", first_id, FIRST_ID) % 4:
        raise ValueError(f"first_id must be a multiple of 4 and ≥ 0, got {first_id}")
    logits = sampled_logits(logits, None)
    B = logits.shape[0]
    backend = resolve(backend, logits)
    known = None if maximum is None else _known(maximum, logits)
    parameters = checked_parameters(
        B,
        logits.device,
        temperature=temperature,
        min_p=min_p,
        seed=seed,
        position=position,
        stream=stream,
    )
    allowed = allowed_tokens(token_bitmask, logits)
    run = _op if tracing(logits) else _sample_partial
    candidate, token = run(logits, *parameters.packed(), allowed, first_id, known, backend)
    return SamplePartial(*candidate, token)


@torch.no_grad()
def merge_samples(
    partials: Sequence[SamplePartial],
    temperature: float | torch.Tensor,
    *,
    min_p: float | torch.Tensor | None = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that `sample` draws from the whole vocabulary, whatever the number of ranks.

    A row can stay open: a rank's candidate lies below the cut of the whole row and hides one that
    does not. Such rows are rare. Call `sample_partial` again with `maximum` the largest of the
    ranks' maxima, and merge again.

    Args:
        partials: one a rank.
        temperature, min_p: as given to `sample_partial`.

    Returns:
        token `[B]` int64 (not to be used where open, 0 where temperature or min_p is out of range
        on a GPU), open `[B]` bool.

    Raises:
        ValueError: without partials, or for a temperature or min_p that `sample` refuses.
    """
    if not partials:
        raise ValueError("partials must hold one SamplePartial a rank, got none")
    stacked = SamplePartial(*(torch.stack(field) for field in zip(*partials)))
    resolve(None, stacked.maximum)
    B, device = stacked.maximum.shape[1], stacked.maximum.device
    min_p = 0.0 if min_p is None else min_p
    given = ("temperature", temperature, TEMPERATURE), ("min_p", min_p, PROBABILITY)
    cut = (check_parameter(*one, B, torch.float32, device) for one in given)
    token, _, still_open = merge_candidates(stacked, *cut)
    return token, still_open.any(0)
