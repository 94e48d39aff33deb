"""`logit_stats` and `token_stats`: what losses and filters need to know of each token's logits, without keeping the logits."""

from typing import NamedTuple

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.torch_backend import logit_stats as torch_backend

_CHUNK_BYTES = 128 << 20  # of one reused block of logits on a GPU
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class TokenStats(NamedTuple):
    """Per-row statistics of the logits z, each `[N]`. Rows whose target is ignored hold 0, and rank −1."""

    max_logit: torch.Tensor  # fp32
    argmax: torch.Tensor  # int64, the lowest id on ties
    target_logit: torch.Tensor  # fp32
    logsumexp: torch.Tensor  # fp32
    rank: torch.Tensor  # int64: ids with a strictly larger logit than the target; 0 = the target is an argmax
    entropy: torch.Tensor  # fp32, nats, of softmax(z)


def _fake(target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kinds = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.float32)
    return tuple(torch.empty(target.shape[0], dtype=kind, device=target.device) for kind in kinds)


def _check_ids(target: torch.Tensor, V: int, ignore_index: int) -> None:
    """Only on a CPU: on a GPU looking would be a host sync."""
    if target.device.type != "cpu":
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= V))]
    if wrong.numel():
        raise ValueError(f"target ids must be in [0, {V}) or {ignore_index}, got {wrong[0].item()}")


_Six = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("autodeco_fast::logit_stats", mutates_args=())
def _logit_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> _Six:
    _check_ids(target, logits.shape[1], ignore_index)
    if backend == "triton":
        from autodeco_fast.kernels.logit_stats import logit_stats as rows
    else:
        rows = torch_backend.logit_stats
    return rows(logits, target, logit_scale, softcap, ignore_index)


@_logit_stats.register_fake
def _(logits, target, logit_scale, softcap, ignore_index, backend):
    return _fake(target)


@torch.library.custom_op("autodeco_fast::token_stats", mutates_args=())
def _token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> _Six:
    _check_ids(target, weight.shape[0], ignore_index)
    if backend == "torch":
        return torch_backend.token_stats(hidden, weight, target, bias, logit_scale, softcap, ignore_index)
    from autodeco_fast.kernels.logit_stats import logit_stats as rows

    valid = (target != ignore_index).nonzero()[:, 0]
    V = weight.shape[0]
    chunk = max(1, _CHUNK_BYTES // (V * hidden.element_size()))
    block = torch.empty(min(chunk, len(valid)), V, dtype=hidden.dtype, device=hidden.device)
    parts = []
    for index in valid.split(chunk):
        logits = block[: len(index)]
        if bias is None:
            torch.mm(hidden[index], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[index], weight.T, out=logits)
        parts.append(rows(logits, target[index], logit_scale, softcap, ignore_index))
    return torch_backend.scatter(valid, parts, target.shape[0])


@_token_stats.register_fake
def _(hidden, weight, target, bias, logit_scale, softcap, ignore_index, backend):
    return _fake(target)


def _check(rows: torch.Tensor, name: str, V: int, target: torch.Tensor, softcap: float | None) -> None:
    if rows.dim() != 2 or V == 0:
        raise ValueError(f"{name} must have two dimensions, the last not empty, got shape {tuple(rows.shape)}")
    if rows.dtype not in _FLOATS:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {rows.dtype}")
    if target.shape != rows.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be [{rows.shape[0]}] int64, got {tuple(target.shape)} {target.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or positive, got {softcap}")


@torch.no_grad()
def logit_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of materialised logits; not differentiable.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32.
        target: `[N]` int64 ids, `ignore_index` where there is none.
        logit_scale, softcap: `z = softcap·tanh(logit_scale·logits / softcap)`; no tanh for None.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes or dtypes other than these.
    """
    _check(logits, "logits", logits.shape[-1], target, softcap)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return TokenStats(
        *_logit_stats(logits, target.contiguous(), float(logit_scale), softcap, ignore_index, resolve(backend, logits))
    )


@torch.no_grad()
def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of `z = softcap·tanh(logit_scale·(hidden @ weight.T + bias) / softcap)`, never holding `[N, V]`.

    Memory is one chunk of logits; ignored rows are not multiplied. Not differentiable: the base model is frozen.

    Args:
        hidden: `[N, H]` what enters the output embedding, bf16, fp16 or fp32.
        weight: `[V, H]` of the same dtype.
        target: `[N]` int64 ids, `ignore_index` where there is none.
        bias: `[V]` or None.
        logit_scale, softcap: in this order, after the bias.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes or dtypes other than these.
    """
    if weight.dim() != 2 or hidden.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden and weight must be [N, H] and [V, H], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have the dtype of hidden, got {weight.dtype} and {hidden.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype):
        raise ValueError(f"bias must be [{weight.shape[0]}] {hidden.dtype}, got {tuple(bias.shape)} {bias.dtype}")
    _check(hidden, "hidden", weight.shape[0], target, softcap)
    chosen = resolve(backend, hidden, weight)
    return TokenStats(
        *_token_stats(hidden, weight, target.contiguous(), bias, float(logit_scale), softcap, ignore_index, chosen)
    )
