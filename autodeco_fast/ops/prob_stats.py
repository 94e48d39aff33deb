"""`prob_stats`: the four numbers of a distribution that AutoDeco's top-p head sees."""

from typing import NamedTuple

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.ops.checks import (
    ALL_FLOATS,
    FINITE,
    check_logits,
    check_number,
    check_row,
    check_softcap,
)
from autodeco_fast.ops.logit_stats import row_dtype
from autodeco_fast.torch_backend import logit_stats
from autodeco_fast.torch_backend import prob_stats as torch_backend


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
    if backend == "triton":
        from autodeco_fast.kernels.prob_stats import prob_stats as rows
    else:
        rows = torch_backend.prob_stats
    return rows(logits, temperature, logit_scale, softcap)


@_prob_stats.register_fake
def _(logits, temperature, logit_scale, softcap, backend):
    return logits.new_empty(4, logits.shape[0], dtype=logit_stats.kind_of(logits))


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
    check_row("temperature", temperature, len(logits))
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    logits = logits.detach() if logits.stride(1) == 1 else logits.detach().contiguous()
    return ProbStats(
        *_prob_stats(logits, row_dtype(temperature.detach(), logits), scale, softcap, chosen)
    )
