"""Statistics of a vocabulary split over ranks: each looks at its rows of the LM head, one
merges."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.numerics import ALL_FLOATS, compute_dtype
from autodeco_fast.ops.checks import (
    COUNT,
    FINITE,
    IDS,
    check_integer,
    check_number,
    check_product,
    check_row,
    check_softcap,
    check_target,
    row_parameter,
    unit_stride,
)
from autodeco_fast.ops.logit_stats import (
    check_temperature,
    columns_of,
    inverse_of,
    statistics,
)
from autodeco_fast.ops.token_stats import CHUNK_BYTES, row_sums_of_product, streams
from autodeco_fast.stats import IGNORED, TokenStats
from autodeco_fast.vocab_parallel import merge_row_sums


class TokenStatsPartial(NamedTuple):
    """What one rank knows: 32 bytes a row to send, 44 with temperatures."""

    # [4 or 7, N]: largest logit, target's logit, sums; see autodeco_fast/stats.py
    floats: torch.Tensor
    ints: torch.Tensor  # [2, N] int64: argmax in the whole vocabulary, ids above the target


@torch.library.custom_op("autodeco_fast::target_logits", mutates_args=())
def _target_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    rounded: bool,
    backend: str,
) -> torch.Tensor:
    run = implementation(backend, "target_logit", module="token_stats")
    return run(hidden, weight, column, bias, logit_scale, softcap, rounded=rounded)


@_target_logits.register_fake
def _(hidden, weight, column, bias, logit_scale, softcap, rounded, backend):
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))


@torch.no_grad()
def target_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    first_id: int,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: torch.Tensor | None = None,
    ignore_index: int = -100,
    fused: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`[N]` logits of the targets among this rank's ids, −inf for the others: their maximum over
    the ranks is every target's.

    Arguments as given to `token_stats_partial`; `temperature` and `fused` say whether the logits
    that it compares are rounded to the dtype of `hidden`. Then these are too: of tokens that tie
    after the rounding none ranks above the other.
    """
    check_product(hidden, weight, bias, ALL_FLOATS)
    chosen = resolve(backend, hidden, weight)
    first_id = check_integer("first_id", first_id, COUNT)
    check_target(target, hidden, None, ignore_index)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    column = columns_of(target, weight.shape[0], ignore_index, first_id)
    bias = None if bias is None else bias.contiguous()
    check_temperature(temperature, None, hidden)
    # The torch backend's products are all in the dtype of hidden.
    rounded = chosen == "torch" or not streams(fused, chosen, hidden, temperature)
    given = unit_stride(hidden), unit_stride(weight), column, bias, scale, softcap
    return _target_logits(*given, rounded, chosen)


@torch.no_grad()
def token_stats_partial(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    target_logit: torch.Tensor,
    *,
    first_id: int,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: torch.Tensor | None = None,
    ignore_index: int = -100,
    fused: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str | None = None,
) -> TokenStatsPartial:
    """What one rank of a vocabulary-parallel model contributes to `merge_token_stats`.

    Args:
        hidden: `[N, H]`, the same on every rank.
        weight: `[V_rank, H]`, the rows of ids first_id … first_id + V_rank − 1; `bias` their part
            of it.
        target: `[N]` int64 ids of the whole vocabulary.
        target_logit: `[N]`, the maximum of all ranks' `target_logits`, taken with the same
            `temperature` and `fused`.
        temperature: `[N]` or None, the same on every rank.
        logit_scale, softcap, ignore_index, fused, chunk_bytes, backend: as in `token_stats`.

    Raises:
        ValueError: as `token_stats`, or for a negative `first_id`.
        RuntimeError: as `logit_stats`.
    """
    check_product(hidden, weight, bias, ALL_FLOATS)
    chosen = resolve(backend, hidden, weight)
    first_id = check_integer("first_id", first_id, COUNT)
    check_target(target, hidden, None, ignore_index)
    check_row("target_logit", target_logit, hidden)
    check_temperature(temperature, None, hidden)
    column = columns_of(target, weight.shape[0], ignore_index, first_id)
    inverse = None if temperature is None else inverse_of(temperature)
    floats, ints = row_sums_of_product(
        hidden,
        weight,
        column,
        target_logit,
        inverse,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        fused=streams(fused, chosen, hidden, temperature),
        backend=chosen,
    )
    offset = torch.where(column == IGNORED, 0, first_id)
    return TokenStatsPartial(floats, ints + torch.stack([offset, torch.zeros_like(offset)]))


def merge_token_stats(
    partials: Sequence[TokenStatsPartial],
    target: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """`token_stats` of the whole vocabulary from its partials, in any order: the maximum of maxima,
    sums rescaled to it, the owner's target, added ranks. Differentiable in the temperature.

    Args:
        partials: one a rank.
        target, temperature, ignore_index: as given to `token_stats_partial`.

    Raises:
        ValueError: without partials, for other shapes, or for a temperature that the partials
            do not know.
        RuntimeError: as `logit_stats`.
    """
    if not partials:
        raise ValueError("partials must hold one TokenStatsPartial a rank, got none")
    pairs = [tuple(part) for part in partials]
    like = pairs[0][0][0]
    resolve(None, pairs[0][0])
    check_target(target, like, None, ignore_index)
    check_temperature(temperature, None, like)
    if temperature is not None and len(pairs[0][0]) != 7:
        raise ValueError("temperature must be None: the partials were taken without one")

    def sums_of(column, threshold, inverse_temperature, cut):
        return merge_row_sums(pairs, row_parameter(inverse_temperature, pairs[0][0]))

    return statistics(sums_of, columns_of(target, IDS.high, ignore_index), temperature, None)
