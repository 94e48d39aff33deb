"""`sample`: logits to tokens by Gumbel-max over the Min-P set."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.torch_backend import min_p_sample as torch_backend

_EXTRA = ("logprob", "kept", "full_logprob")


class SampleOutput(NamedTuple):
    """What `sample` returns, one entry a row; None for what was not asked for."""

    token: torch.Tensor  # [B] int64
    logprob: (
        torch.Tensor | None
    )  # [B] fp32: of the token under the distribution drawn from, cut and renormalised, nats; 0 if greedy
    kept: torch.Tensor | None  # [B] int32: tokens inside all cuts; 1 if greedy, 0 if nothing is finite or allowed
    status: torch.Tensor  # [B] int32: 0, or the sum of 1 (NaN seen), 2 (+inf seen), 4 (nothing finite or allowed: token 0)
    full_logprob: torch.Tensor | None = None  # [B] fp32, nats: the same, uncut


@torch.library.custom_op("autodeco_fast::min_p_sample", mutates_args=())
def _min_p_sample(
    logits: torch.Tensor,
    rows: Sequence[torch.Tensor | None],
    floats: Sequence[float],
    ints: Sequence[int],
    allowed: torch.Tensor | None,
    want: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows are temperature, min_p, top_p, then seed, position, stream, top_k: None where a number of `floats`, `ints` serves.

    Of the five results those not in `want` are empty. A stream of −1 is the row index.
    """
    if backend == "triton":
        from autodeco_fast.kernels.min_p_sample import min_p_sample
    else:
        min_p_sample = torch_backend.min_p_sample
    temperature, min_p, top_p, seed, position, stream, top_k = (
        number if row is None else row for row, number in zip(rows, (*floats, *ints))
    )
    stream = None if rows[5] is None and stream == -1 else stream
    names = tuple(want.split())
    options = {"top_k": top_k, "top_p": top_p, "allowed": allowed, "want": names}
    out = min_p_sample(logits, temperature, min_p, seed, position, stream, **options)
    return tuple(out[name] if name in out else logits.new_empty(0) for name in ("token", "status", *_EXTRA))


@_min_p_sample.register_fake
def _(logits, rows, floats, ints, allowed, want, backend):
    B = logits.shape[0]
    asked = want.split()
    empty = lambda name, kind: logits.new_empty(B, dtype=kind) if name in asked else logits.new_empty(0)  # noqa: E731
    new = lambda kind: logits.new_empty(B, dtype=kind)  # noqa: E731
    return (
        new(torch.int64),
        new(torch.int32),
        empty("logprob", torch.float32),
        empty("kept", torch.int32),
        empty("full_logprob", torch.float32),
    )


def _row(name: str, value: float | torch.Tensor, B: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """A tensor as `[B]` of this dtype; None for a number, which needs no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    if value.shape == (B,) and value.dtype == dtype and value.device == device:
        return value.contiguous()
    if value.shape not in ((), (1,), (B,)):
        raise ValueError(f"{name} must be a scalar or [{B}], got shape {tuple(value.shape)}")
    return value.to(device=device, dtype=dtype).reshape(-1).expand(B).contiguous()


def _check_range(name: str, value: float | torch.Tensor | None, low: float, high: float) -> None:
    """Numbers are checked here; tensors would need a host sync, so they are the caller's."""
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")


def _check_logits(logits: torch.Tensor, vocab_size: int | None, token_bitmask: torch.Tensor | None) -> torch.Tensor:
    """The `[B, vocab_size]` logits, unit stride along V."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] with V > 0, got shape {tuple(logits.shape)}")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    if vocab_size is not None:
        if not 0 < vocab_size <= logits.shape[1]:
            raise ValueError(f"vocab_size must be in [1, {logits.shape[1]}], got {vocab_size}")
        logits = logits[:, :vocab_size]
    B, V = logits.shape
    if token_bitmask is not None:
        words = -(-V // 32)
        if token_bitmask.dtype != torch.int32 or token_bitmask.dim() != 2 or token_bitmask.shape[1] < words:
            raise ValueError(
                f"token_bitmask must be [{B}, {words}] int32, got {tuple(token_bitmask.shape)} {token_bitmask.dtype}"
            )
        if token_bitmask.shape[0] != B:
            raise ValueError(f"token_bitmask must have a row for each of {B} rows of logits, got {token_bitmask.shape[0]}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def sample(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    min_p: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    seed: int | torch.Tensor,
    position: int | torch.Tensor = 0,
    stream: int | torch.Tensor | None = None,
    token_bitmask: torch.Tensor | None = None,
    vocab_size: int | None = None,
    return_logprob: bool = False,
    return_kept: bool = False,
    return_full_logprob: bool = False,
    backend: str | None = None,
) -> SampleOutput:
    """Draws one token a row from `softmax(logits / temperature)` cut by top-k, then top-p, then Min-P.

    All three cuts are a lowest logit. Min-P keeps token i when `p_i ≥ min_p · max p`, that is when
    `z_i ≥ max z + T ln(min_p)`; top-k keeps what is not below the k-th largest; top-p keeps i while what is larger than z_i
    weighs less than top_p of what top-k left. Tokens with equal logits stay or go together. The draw is Gumbel-max with
    Philox noise that depends on (seed, position, stream, token id) only, so the same row gives the same token in any batch,
    with any padding and on either backend.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32. NaN and +inf are taken out of the row and reported in `status`.
        temperature: scalar or `[B]`, ≥ 0. Below 1e-3 a row is greedy: its argmax, the lowest id on ties.
        min_p: scalar or `[B]`, in [0, 1]; 0 cuts nothing.
        top_k: scalar or `[B]`, ≥ 0; None and 0 cut nothing.
        top_p: scalar or `[B]`, in (0, 1]; None and 1 cut nothing.
        seed: 64-bit integer, or `[B]` int64 for a seed a row.
        position: which draw of the sequence this is, scalar or `[B]`, in [0, 2³²).
        stream: separates rows that share a seed, scalar or `[B]`, in [0, 2³²). By default the row index under one seed, and 0
            under seeds a row.
        token_bitmask: `[B, ⌈V/32⌉]` int32, bit i % 32 of word i // 32 allows token i (the layout of xgrammar).
        vocab_size: ids from here on are padding; V by default.
        return_logprob, return_kept, return_full_logprob: fill these fields too; the first two read what is kept again.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes or numbers outside the above. Values inside tensors are not checked.
    """
    logits = _check_logits(logits, vocab_size, token_bitmask)
    B, device = logits.shape[0], logits.device
    top_k, top_p = 0 if top_k is None else top_k, 1.0 if top_p is None else top_p
    for name, value, low, high in (
        ("temperature", temperature, 0.0, torch.finfo(torch.float32).max),
        ("min_p", min_p, 0.0, 1.0),
        ("top_p", top_p, torch.finfo(torch.float32).tiny, 1.0),
        ("top_k", top_k, 0, 2**31 - 1),
        ("position", position, 0, 2**32 - 1),
        ("stream", stream, 0, 2**32 - 1),
    ):
        _check_range(name, value, low, high)
    if stream is None:
        stream = 0 if isinstance(seed, torch.Tensor) and seed.shape == (B,) else -1
    if not isinstance(seed, torch.Tensor):
        seed = (int(seed) + 2**63) % 2**64 - 2**63
    floats = {"temperature": temperature, "min_p": min_p, "top_p": top_p}
    ints = {"seed": seed, "position": position, "stream": stream, "top_k": top_k}
    rows = [_row(name, value, B, torch.float32, device) for name, value in floats.items()]
    rows += [_row(name, value, B, torch.int64, device) for name, value in ints.items()]
    number = lambda value: 0 if isinstance(value, torch.Tensor) else value  # noqa: E731
    asked = zip(_EXTRA, (return_logprob, return_kept, return_full_logprob))
    want = [name for name, wanted in asked if wanted]
    token, status, *extra = _min_p_sample(
        logits,
        rows,
        [float(number(v)) for v in floats.values()],
        [number(v) for v in ints.values()],
        None if token_bitmask is None else token_bitmask.contiguous(),
        " ".join(want),
        resolve(backend, logits),
    )
    logprob, kept, full = (value if name in want else None for name, value in zip(_EXTRA, extra))
    return SampleOutput(token, logprob, kept, status, full)
