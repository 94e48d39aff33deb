"""`sample`: logits to tokens by Gumbel-max over the Min-P set."""

from typing import NamedTuple

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.torch_backend import min_p_sample as torch_backend


class SampleOutput(NamedTuple):
    """What `sample` returns, one entry a row."""

    token: torch.Tensor  # [B] int64
    logprob: torch.Tensor  # [B] fp32: of the token under softmax(z/T) cut at Min-P and renormalised, nats; 0 if greedy
    kept: torch.Tensor  # [B] int32: tokens inside the cut; 1 if greedy, 0 if nothing is finite
    status: torch.Tensor  # [B] int32: 0, or the sum of 1 (NaN seen), 2 (+inf seen), 4 (nothing finite: token 0)


@torch.library.custom_op("autodeco_fast::min_p_sample", mutates_args=())
def _min_p_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from autodeco_fast.kernels.min_p_sample import min_p_sample
    else:
        min_p_sample = torch_backend.min_p_sample
    return min_p_sample(logits, temperature, min_p, seed, position, stream)


@_min_p_sample.register_fake
def _(logits, temperature, min_p, seed, position, stream, backend):
    B = logits.shape[0]
    kinds = (torch.int64, torch.float32, torch.int32, torch.int32)
    return tuple(torch.empty(B, dtype=kind, device=logits.device) for kind in kinds)


def _rows(name: str, value: float | torch.Tensor, B: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A scalar or `[B]` tensor as a `[B]` tensor."""
    if not isinstance(value, torch.Tensor):
        return torch.full((B,), value, dtype=dtype, device=device)
    if value.shape == (B,) and value.dtype == dtype and value.device == device:
        return value.contiguous()
    if value.shape not in ((), (1,), (B,)):
        raise ValueError(f"{name} must be a scalar or [{B}], got shape {tuple(value.shape)}")
    return value.to(device=device, dtype=dtype).reshape(-1).expand(B).contiguous()


def _check_range(name: str, value: float | torch.Tensor, low: float, high: float) -> None:
    """Numbers are checked here; tensors would need a host sync, so they are the caller's."""
    if not isinstance(value, torch.Tensor) and not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")


def sample(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    min_p: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor,
    position: int | torch.Tensor = 0,
    stream: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> SampleOutput:
    """Draws one token a row from `softmax(logits / temperature)` cut at Min-P.

    Token i is kept when `p_i ≥ min_p · max p`, that is when `z_i ≥ max z + T ln(min_p)`. The draw is Gumbel-max with Philox
    noise that depends on (seed, position, stream, token id) only, so the same row gives the same token in any batch, with
    any padding and on either backend.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32. NaN and +inf are taken out of the row and reported in `status`.
        temperature: scalar or `[B]`, ≥ 0. Below 1e-3 a row is greedy: its argmax, the lowest id on ties.
        min_p: scalar or `[B]`, in [0, 1]; 0 keeps every finite logit.
        seed: 64-bit integer, or `[B]` int64 for a seed a row.
        position: which draw of the sequence this is, scalar or `[B]`, in [0, 2³²).
        stream: separates rows that share a seed, scalar or `[B]`. By default the row index under one seed, and 0 under seeds
            a row.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes or numbers outside the above. Values inside tensors are not checked.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] with V > 0, got shape {tuple(logits.shape)}")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    _check_range("temperature", temperature, 0.0, float("inf"))
    _check_range("min_p", min_p, 0.0, 1.0)
    _check_range("position", position, 0, 2**32 - 1)
    B, device = logits.shape[0], logits.device
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    per_row_seeds = isinstance(seed, torch.Tensor) and seed.dim() == 1 and seed.shape[0] == B
    if stream is None:
        stream = 0 if per_row_seeds else torch.arange(B, device=device)
    if not isinstance(seed, torch.Tensor):
        seed = (int(seed) + 2**63) % 2**64 - 2**63
    out = _min_p_sample(
        logits,
        _rows("temperature", temperature, B, torch.float32, device),
        _rows("min_p", min_p, B, torch.float32, device),
        _rows("seed", seed, B, torch.int64, device),
        _rows("position", position, B, torch.int64, device),
        _rows("stream", stream, B, torch.int64, device),
        resolve(backend, logits),
    )
    return SampleOutput(*out)
