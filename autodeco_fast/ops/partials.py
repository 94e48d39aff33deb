"""Drawing from a vocabulary split over ranks: each draws from its part, one merges."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.ops.min_p_sample import _check_logits, parameters, row_index
from autodeco_fast.torch_backend import min_p_sample as torch_backend
from autodeco_fast.torch_backend.merge import merge


class SamplePartial(NamedTuple):
    """A part's candidate for each row: 20 bytes a row to send."""

    maximum: torch.Tensor  # [B] fp32: the part's largest logit, or what it was told
    score: torch.Tensor  # [B] fp32: of its candidate, z + T·g; −inf without one
    logit: torch.Tensor  # [B] fp32: of its candidate
    token: torch.Tensor  # [B] int64: its candidate's id in the whole vocabulary


@torch.no_grad()
def sample_partial(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    first_id: int,
    min_p: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor,
    position: int | torch.Tensor = 0,
    stream: int | torch.Tensor | None = None,
    token_bitmask: torch.Tensor | None = None,
    maximum: torch.Tensor | None = None,
    backend: str | None = None,
) -> SamplePartial:
    """What one rank of a vocabulary-parallel server contributes to `merge_partials`.

    Args:
        logits: `[B, V_part]` of the ids first_id … first_id + V_part − 1.
        first_id: a multiple of 4.
        token_bitmask: of this part's ids.
        maximum: `[B]` fp32 largest logits of the whole vocabulary, if known: with them no row stays open.
        temperature, min_p, seed, position, stream, backend: as in `sample`, the same on every rank.

    Raises:
        ValueError: as `sample`, or for a `first_id` that is no multiple of 4.
    """
    if first_id < 0 or first_id % 4:
        raise ValueError(f"first_id must be a multiple of 4 and ≥ 0, got {first_id}")
    logits = _check_logits(logits, None, token_bitmask)
    B = len(logits)
    if maximum is not None and (maximum.shape != (B,) or maximum.dtype != torch.float32):
        raise ValueError(f"maximum must be [{B}] float32, got {tuple(maximum.shape)} {maximum.dtype}")
    floats, ints = parameters(B, logits.device, temperature, min_p, None, seed, position, stream, None)
    if resolve(backend, logits) == "triton":
        from autodeco_fast.kernels.min_p_sample import min_p_sample
    else:
        min_p_sample = torch_backend.min_p_sample
    seed, position, stream = ints[:3]
    options = {"allowed": token_bitmask, "first": first_id, "known": maximum, "want": ("partial",)}
    out = min_p_sample(logits, *floats[:2], seed, position, row_index(stream), **options)
    return SamplePartial(*out["partial"], out["token"])


@torch.no_grad()
def merge_partials(
    parts: Sequence[SamplePartial], temperature: float | torch.Tensor, *, min_p: float | torch.Tensor = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the whole vocabulary from its parts': those `sample` draws, whatever the number of parts.

    A row can stay open: a part's candidate lies below the cut of the whole row and hides one that does not. Such rows are
    rare. Call `sample_partial` again with `maximum` the largest of the parts' maxima, and merge again.

    Args:
        parts: one a rank.
        temperature, min_p: as given to `sample_partial`.

    Returns:
        token `[B]` int64 (not to be used where open), open `[B]` bool.
    """
    stacked = SamplePartial(*(torch.stack(field) for field in zip(*parts)))
    token, _, still_open = merge(*stacked, temperature, min_p)
    return token, still_open.any(0)
