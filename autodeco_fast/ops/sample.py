"""`sample`: logits to tokens by Gumbel-max over the Min-P set."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.ops.checks import (
    PROBABILITY,
    Interval,
    check_integer,
    check_logits,
    check_parameter,
    check_tensor,
)
from autodeco_fast.torch_backend import sample as torch_backend

_EXTRA = ("logprob", "kept", "full_logprob")
_KINDS = {"token": torch.int64, "status": torch.int32, "kept": torch.int32}  # fp32 otherwise


class SampleOutput(NamedTuple):
    """What `sample` returns, one entry a row; None for what was not asked for."""

    token: torch.Tensor  # [B] int64
    # [B] fp32: of the token under the distribution drawn from, cut and renormalised, nats; 0 if
    # greedy
    logprob: torch.Tensor | None
    # [B] int32: tokens inside all cuts; 1 if greedy, 0 if nothing is finite or allowed, or where
    # the status has 8
    kept: torch.Tensor | None
    # [B] int32: 0, or the sum of 1 (NaN seen), 2 (+inf seen), 4 (nothing finite or allowed: token
    # 0) and 8 (temperature, min_p,
    # top_k or top_p is NaN or out of range, where the host does not look: token 0)
    status: torch.Tensor
    full_logprob: torch.Tensor | None = None  # [B] fp32, nats: the same as logprob, uncut


def _run(
    logits: torch.Tensor,
    floats: Sequence,
    ints: Sequence,
    allowed: torch.Tensor | None,
    want: tuple[str, ...],
    backend: str,
) -> dict[str, torch.Tensor]:
    """Floats: temperature, min_p, top_p; ints: seed, position, stream (−1: the row), top_k. All
    `[B]` tensors or numbers."""
    if backend == "triton":
        from autodeco_fast.kernels.sample import sample as implementation
    else:
        implementation = torch_backend.sample
    temperature, min_p, top_p = floats
    seed, position, stream, top_k = ints
    options = {"top_k": top_k, "top_p": top_p, "allowed": allowed, "want": want}
    return implementation(logits, temperature, min_p, seed, position, row_index(stream), **options)


@torch.library.custom_op("autodeco_fast::sample", mutates_args=())
def _sample(
    logits: torch.Tensor,
    rows: Sequence[torch.Tensor | None],
    floats: Sequence[float],
    ints: Sequence[int],
    allowed: torch.Tensor | None,
    want: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_run` for the tracer: `rows` are its floats, then its ints, None where the number in
    `floats` or `ints` serves.

    Of the five results those not in `want` are empty.
    """
    values = joined(rows, (*floats, *ints))
    out = _run(logits, values[:3], values[3:], allowed, tuple(want.split()), backend)
    nothing = {name: logits.new_empty(0, dtype=_KINDS.get(name, torch.float32)) for name in _EXTRA}
    return tuple({**nothing, **out}[name] for name in ("token", "status", *_EXTRA))


@_sample.register_fake
def _(logits, rows, floats, ints, allowed, want, backend):
    filled = ("token", "status", *want.split())
    return tuple(
        logits.new_empty(
            logits.shape[0] if name in filled else 0, dtype=_KINDS.get(name, torch.float32)
        )
        for name in ("token", "status", *_EXTRA)
    )


def _traced(logits, floats, ints, allowed, want, backend) -> dict[str, torch.Tensor]:
    """`_run` through the registered op."""
    rows, numbers = split([*floats, *ints])
    token, status, *extra = _sample(
        logits, rows, [float(n) for n in numbers[:3]], numbers[3:], allowed, " ".join(want), backend
    )
    return {
        "token": token,
        "status": status,
        **{n: value for n, value in zip(_EXTRA, extra) if n in want},
    }


TEMPERATURE = Interval(0.0, 1e29, "[0, 1e29]")
TOP_P = Interval(torch.finfo(torch.float32).tiny, 1.0, "(0, 1]")
TOP_K = Interval(0, 2**31 - 1, "[0, 2**31)")
COUNTER = Interval(0, 2**32 - 1, "[0, 2**32)")


def parameters(
    B: int, device: torch.device, temperature, min_p, top_p, seed, position, stream, top_k
) -> tuple[list[float | torch.Tensor], list[int | torch.Tensor]]:
    """Checked parameters, each a number or a `[B]` tensor: (temperature, min_p, top_p), (seed,
    position, stream, top_k).

    None cuts nothing. A stream of −1 is the row index.

    Raises:
        ValueError: naming what is out of range or of another shape or type.
    """
    floats = (
        ("temperature", temperature, TEMPERATURE),
        ("min_p", 0.0 if min_p is None else min_p, PROBABILITY),
        ("top_p", 1.0 if top_p is None else top_p, TOP_P),
    )
    by_row = isinstance(seed, torch.Tensor) and seed.shape == (B,)
    ints = (
        ("seed", seed, None),
        ("position", position, COUNTER),
        ("stream", 0 if stream is None else stream, COUNTER),
        ("top_k", 0 if top_k is None else top_k, TOP_K),
    )
    floats = [check_parameter(*given, B, torch.float32, device) for given in floats]
    ints = [check_parameter(*given, B, torch.int64, device) for given in ints]
    if stream is None and not by_row:
        ints[2] = -1
    return floats, ints


def row_index(stream: int | torch.Tensor) -> int | torch.Tensor | None:
    """The stream as kernels take it: None for the row index."""
    return None if isinstance(stream, int) and stream == -1 else stream


def tracing(tensor: torch.Tensor) -> bool:
    """Whether an op must go through the dispatcher: a compiler looks on, or the tensor is no plain
    one."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def split(values: list[float | torch.Tensor]) -> tuple[list[torch.Tensor | None], list[float]]:
    """Parameters as a schema takes them: tensors or None, and the numbers that serve where there is
    None."""
    rows = [value if isinstance(value, torch.Tensor) else None for value in values]
    return rows, [0 if isinstance(value, torch.Tensor) else value for value in values]


def joined(
    rows: Sequence[torch.Tensor | None], numbers: Sequence[float]
) -> list[float | torch.Tensor]:
    """The inverse of `split`."""
    return [number if row is None else row for row, number in zip(rows, numbers)]


def sampled_logits(logits: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    """The checked `[B, vocab_size]` logits, detached, unit stride along V."""
    check_logits(logits)
    if vocab_size is not None:
        V = logits.shape[1]
        logits = logits[:, : check_integer("vocab_size", vocab_size, Interval(1, V, f"[1, {V}]"))]
    logits = logits.detach()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def allowed_tokens(token_bitmask: torch.Tensor | None, B: int, V: int) -> torch.Tensor | None:
    """The checked bitmask, contiguous."""
    if token_bitmask is None:
        return None
    check_tensor("token_bitmask", token_bitmask)
    words, shape = -(-V // 32), tuple(token_bitmask.shape)
    if token_bitmask.dtype != torch.int32 or len(shape) != 2 or shape[0] != B or shape[1] < words:
        raise ValueError(
            f"token_bitmask must be [{B}, {words}] int32, got {shape} {token_bitmask.dtype}"
        )
    return token_bitmask.contiguous()


def sample(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    min_p: float | torch.Tensor | None = 0.0,
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
    """Draws one token a row from `softmax(logits / temperature)` cut by top-k, then top-p, then
    Min-P.

    All three cuts are a lowest logit. Min-P keeps token i when `p_i ≥ min_p · max p`, that is when
    `z_i ≥ max z + T ln(min_p)`; top-k keeps what is not below the k-th largest; top-p keeps i while
    what is larger than z_i weighs less than top_p of what top-k left. Tokens with equal logits stay
    or go together. The draw is Gumbel-max with Philox noise that depends on (seed, position,
    stream, token id) only, so the same row gives the same token in any batch, with any padding and
    on either backend.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32. NaN and +inf are taken out of the row and reported in
            `status`.
        temperature: scalar or `[B]`, in [0, 1e29]. Below 1e-3 a row is greedy: its argmax, the
            lowest id on ties.
        min_p: scalar or `[B]`, in [0, 1]; None and 0 cut nothing.
        top_k: scalar or `[B]`, in [0, 2³¹); None and 0 cut nothing.
        top_p: scalar or `[B]`, in (0, 1]; None and 1 cut nothing.
        seed: an integer in [−2⁶³, 2⁶⁴), as `torch.Generator.manual_seed` takes it, or `[B]`
            integers for a seed a row.
        position: which draw of the sequence this is, scalar or `[B]`, in [0, 2³²).
        stream: separates rows that share a seed, scalar or `[B]`, in [0, 2³²). By default the row
            index under one seed, and 0 under seeds a row.
        token_bitmask: `[B, ⌈V/32⌉]` int32, bit i % 32 of word i // 32 allows token i (the layout of
            xgrammar).
        vocab_size: ids from here on are padding; V by default.
        return_logprob, return_kept, return_full_logprob: fill these fields too; the first two read
            what is kept again.
        backend: None chooses; "triton" or "torch" forces.

    A scalar is a number of any of Python's and numpy's types, or a tensor of one element. Nothing
    is differentiable: logits and parameters are detached.

    Raises:
        ValueError: for shapes, dtypes or values outside the above. Values on a GPU are not looked
            at from the host: a row whose temperature, min_p, top_k or top_p is NaN or out of range
            there gets token 0 and status 8; of its position and stream 32 bits count.
        RuntimeError: under `torch.vmap`, `torch.func` transforms, forward-mode differentiation and
            `torch.jit.trace`.
    """
    logits = sampled_logits(logits, vocab_size)
    backend = resolve(backend, logits)
    floats, ints = parameters(
        logits.shape[0], logits.device, temperature, min_p, top_p, seed, position, stream, top_k
    )
    allowed = allowed_tokens(token_bitmask, *logits.shape)
    want = tuple(
        name
        for name, asked in zip(_EXTRA, (return_logprob, return_kept, return_full_logprob))
        if asked
    )
    # Where there is nothing to trace, the dispatcher would cost as much as the draw.
    out = (_traced if tracing(logits) else _run)(logits, floats, ints, allowed, want, backend)
    return SampleOutput(
        out["token"], out.get("logprob"), out.get("kept"), out["status"], out.get("full_logprob")
    )
