"""The hinge without labels: what a head learns from nothing but the model."""

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.losses.hinge import inverse_width
from autodeco_fast.numerics import ALL_FLOATS, compute_dtype
from autodeco_fast.ops.checks import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    check_choice,
    check_integer,
    check_logits,
    check_number,
    check_product,
    check_row,
    check_softcap,
    row_parameter,
    unit_stride,
)
from autodeco_fast.ops.nucleus_width import nucleus_width
from autodeco_fast.ops.token_stats import CHUNK_BYTES


def nucleus_width_loss(
    temperature: torch.Tensor,
    logits: torch.Tensor,
    *,
    min_p: float = 0.1,
    gravity: float = 0.1,
    max_temperature: float = 2.0,
    unreachable: str = "drop",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """`Σ_i p_i (relu(T*_i − T) + gravity·T)` per row over the tokens within reach, with `p =
    softmax(z)` and `T*_i = (max z − z_i) / (−ln min_p)`: the expectation of `min_p_hinge_loss` over
    targets drawn from the model itself.

    The minimiser is the lowest temperature at which Min-P keeps a share `1 − gravity` of the mass
    within reach: top-p's set, where all mass is. No target is needed, and none adds its noise.
    Differentiable in the temperature, once, not in the logits.

    Args:
        temperature: `[N]` predicted T.
        logits: `[N, V]` bf16, fp16 or fp32 (fp64 on the torch backend). NaN or +inf in a row makes
            its loss NaN; −inf is a token that is never drawn.
        min_p: of the cut the head will be used with, in (0, 1).
        gravity: λ, the share of the model's own probability that may fall outside the cut, ≥ 0.
        max_temperature: the head's T_max.
        unreachable: "drop" leaves tokens with `T*_i > max_temperature` out, of the mass too; "clip"
            sets their T* to it, and T rises to T_max where they have more than `gravity`.
        logit_scale, softcap: `z = softcap·tanh(logit_scale·logits / softcap)`; no tanh for None.
        row_weight: `[N]`, ≥ 0, or None; what a row of weight 0 holds does not matter.
        reduction: "mean" divides by Σ row_weight, and is 0 when that is; "sum"; "none" `[N]`.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes, numbers or options other than these.
        RuntimeError: as `min_p_hinge_loss`.
    """
    check_logits(logits, ALL_FLOATS)
    return _loss(
        temperature,
        unit_stride(logits),
        None,
        bias=None,
        min_p=min_p,
        gravity=gravity,
        max_temperature=max_temperature,
        unreachable=unreachable,
        logit_scale=logit_scale,
        softcap=softcap,
        row_weight=row_weight,
        reduction=reduction,
        chunk_bytes=CHUNK_BYTES,
        backend=resolve(backend, logits),
    )


def linear_nucleus_width_loss(
    temperature: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    min_p: float = 0.1,
    gravity: float = 0.1,
    max_temperature: float = 2.0,
    unreachable: str = "drop",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    row_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    backend: str | None = None,
) -> torch.Tensor:
    """`nucleus_width_loss` of `hidden @ weight.T + bias`, of which a chunk is held at a time.

    Args:
        temperature: `[N]` predicted T.
        hidden: `[N, H]` what enters the output embedding, bf16, fp16 or fp32 (fp64 on the torch
            backend).
        weight: `[V, H]` the output embedding's, of the same dtype, a plain tensor.
        bias: `[V]` or None.
        min_p, gravity, max_temperature, unreachable, logit_scale, softcap, row_weight, reduction,
            backend: as there; scale and softcap come after the bias.
        chunk_bytes: of such a chunk.

    Raises:
        ValueError: for shapes, dtypes, numbers or options other than these.
        RuntimeError: as `min_p_hinge_loss`.
    """
    check_product(hidden, weight, bias, ALL_FLOATS)
    return _loss(
        temperature,
        unit_stride(hidden),
        unit_stride(weight),
        bias=bias,
        min_p=min_p,
        gravity=gravity,
        max_temperature=max_temperature,
        unreachable=unreachable,
        logit_scale=logit_scale,
        softcap=softcap,
        row_weight=row_weight,
        reduction=reduction,
        chunk_bytes=check_integer("chunk_bytes", chunk_bytes, SIZE),
        backend=resolve(backend, hidden, weight),
    )


def _loss(
    temperature: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    min_p: float,
    gravity: float,
    max_temperature: float,
    unreachable: str,
    logit_scale: float,
    softcap: float | None,
    row_weight: torch.Tensor | None,
    reduction: str,
    chunk_bytes: int,
    backend: str,
) -> torch.Tensor:
    """Both losses, once logits or hidden states are checked."""
    check_row("temperature", temperature, hidden)
    if row_weight is not None:
        check_row("row_weight", row_weight, hidden)
        row_weight = row_parameter(row_weight, hidden)
    check_choice("unreachable", unreachable, ("drop", "clip"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    rows, _ = nucleus_width(
        temperature.to(compute_dtype(hidden)).contiguous(),
        hidden,
        weight,
        None if bias is None else bias.detach().contiguous(),
        row_weight,
        inverse_width(min_p),
        check_number("gravity", gravity, NOT_NEGATIVE),
        check_number("max_temperature", max_temperature, POSITIVE),
        unreachable == "clip",
        check_number("logit_scale", logit_scale, FINITE),
        check_softcap(softcap),
        chunk_bytes,
        backend,
    )
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if row_weight is None:
        return total / max(hidden.shape[0], 1)
    mass = row_weight.sum()
    return total / torch.where(mass > 0, mass, 1.0)
