"""`prob_stats`: the four numbers of a distribution that AutoDeco's top-p head sees."""

from typing import NamedTuple

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.numerics import ALL_FLOATS, compute_dtype
from autodeco_fast.ops.checks import (
    FINITE,
    check_logits,
    check_number,
    check_row,
    check_softcap,
    row_parameter,
    unit_stride,
)


class ProbStats(NamedTuple):
    """Of `p = softmax(z / (T + 1e-8))`, each `[N]` fp32 (fp64 where the logits are)."""

    max_prob: torch.Tensor
    entropy: torch.Tensor  # −Σ p ln(p + 1e-8), nats
    variance: torch.Tensor  # of p over the vocabulary, unbiased
    top5: torch.Tensor  # Σ of the five largest p


@torch.library.custom_op("autodeco_fast::prob_stats", mutates_args=())
def _prob_stats(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> torch.Tensor:
    run = implementation(backend, "prob_stats")
    return run(logits, temperature, logit_scale, softcap)


@_prob_stats.register_fake
def _(logits, temperature, logit_scale, softcap, backend):
    return logits.new_empty(4, logits.shape[0], dtype=compute_dtype(logits))


@torch.no_grad()
def prob_stats(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> ProbStats:
    """AutoDeco's enhanced features of each row's distribution at its temperature; not
    differentiable, as reference.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32 (fp64 on the torch backend).
        temperature: `[N]`, > 0.
        logit_scale, softcap: `z = softcap·tanh(logit_scale·logits / softcap)`; no tanh for None.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes or numbers other than these.
        RuntimeError: as `logit_stats`.
    """
    check_logits(logits, ALL_FLOATS)
    chosen = resolve(backend, logits)
    check_row("temperature", temperature, logits)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    logits = unit_stride(logits)
    return ProbStats(
        *_prob_stats(logits, row_parameter(temperature, logits), scale, softcap, chosen)
    )
