"""`sample`: logits to tokens by Gumbel-max over the Min-P set."""

from collections.abc import Sequence

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.numerics import HIGHEST_TEMPERATURE
from autodeco_fast.ops.checks import (
    PROBABILITY,
    Interval,
    check_device,
    check_integer,
    check_logits,
    check_parameter,
    check_tensor,
    tracing,
    unit_stride,
)
from autodeco_fast.sampling import (
    FULL_LOGPROB,
    KEPT,
    LOGPROB,
    SUBTILE,
    Sampled,
    SampleOutput,
    SamplingParameters,
)

_DTYPES = Sampled(torch.int64, torch.int32, torch.float32, torch.int32, torch.float32)


@torch.library.custom_op("autodeco_fast::sample", mutates_args=())
def _sample(
    logits: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    floats: Sequence[float],
    integers: Sequence[int],
    allowed: torch.Tensor | None,
    maxima: torch.Tensor | None,
    want: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op for the tracer: packed parameters; what is not wanted is empty."""
    parameters = SamplingParameters.unpacked(tensors, floats, integers)
    run = implementation(backend, "sample")
    out = run(logits, parameters, allowed=allowed, maxima=maxima, want=want)
    return filled(out, logits)


@_sample.register_fake
def _(logits, tensors, floats, integers, allowed, maxima, want, backend):
    return fake_sampled(logits, want)


def filled(out: Sampled, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All but the candidate, empty tensors for None: a schema has no optional results."""
    return tuple(
        like.new_empty(0, dtype=dtype) if value is None else value
        for value, dtype in zip(out[:5], _DTYPES)
    )


def fake_sampled(like: torch.Tensor, want: int) -> tuple[torch.Tensor, ...]:
    """Shapes and dtypes of what `filled` returns."""
    asked = True, True, want & LOGPROB, want & KEPT, want & FULL_LOGPROB
    sizes = (like.shape[0] if there else 0 for there in asked)
    return tuple(like.new_empty(n, dtype=dtype) for n, dtype in zip(sizes, _DTYPES))


def output_of(out: Sequence[torch.Tensor | None], want: int) -> SampleOutput:
    """What the user asked for, of a `Sampled` or of the op's results."""
    token, status, logprob, kept, full_logprob = out[:5]
    return SampleOutput(
        token,
        logprob if want & LOGPROB else None,
        kept if want & KEPT else None,
        status,
        full_logprob if want & FULL_LOGPROB else None,
    )


TEMPERATURE = Interval(0.0, HIGHEST_TEMPERATURE, "[0, 1e29]")
TOP_P = Interval(torch.finfo(torch.float32).tiny, 1.0, "(0, 1]")
TOP_K = Interval(0, 2**31 - 1, "[0, 2**31)")
COUNTER = Interval(0, 2**32 - 1, "[0, 2**32)")


def checked_parameters(
    B: int,
    device: torch.device,
    *,
    temperature: torch.Tensor | float,
    min_p: torch.Tensor | float | None,
    seed: torch.Tensor | int,
    position: torch.Tensor | int,
    stream: torch.Tensor | int | None,
    top_k: torch.Tensor | int | None = None,
    top_p: torch.Tensor | float | None = None,
) -> SamplingParameters:
    """What the user gave, checked and in one form. None cuts nothing; the stream is the row index
    where it is None under one seed.

    Raises:
        ValueError: naming what is out of range or of another shape or type.
    """

    def real(name: str, value, interval: Interval):
        return check_parameter(name, value, interval, B, torch.float32, device)

    def whole(name: str, value, interval: Interval | None):
        return check_parameter(name, value, interval, B, torch.int64, device)

    if stream is None:
        by_row = isinstance(seed, torch.Tensor) and seed.shape == (B,)
        stream = 0 if by_row else None
    else:
        stream = whole("stream", stream, COUNTER)
    return SamplingParameters(
        temperature=real("temperature", temperature, TEMPERATURE),
        min_p=0.0 if min_p is None else real("min_p", min_p, PROBABILITY),
        top_k=0 if top_k is None else whole("top_k", top_k, TOP_K),
        top_p=1.0 if top_p is None else real("top_p", top_p, TOP_P),
        seed=whole("seed", seed, None),
        position=whole("position", position, COUNTER),
        stream=stream,
    )


def wanted(logprob: bool, kept: bool, full_logprob: bool) -> int:
    """The sum of what is asked for."""
    return LOGPROB * bool(logprob) + KEPT * bool(kept) + FULL_LOGPROB * bool(full_logprob)


def sampled_logits(logits: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    """The checked `[B, vocab_size]` logits, detached, unit stride along V."""
    check_logits(logits)
    if vocab_size is not None:
        V = logits.shape[1]
        logits = logits[:, : check_integer("vocab_size", vocab_size, Interval(1, V, f"[1, {V}]"))]
    return unit_stride(logits)


def allowed_tokens(token_bitmask: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | None:
    """The checked bitmask of logits, contiguous."""
    if token_bitmask is None:
        return None
    B, V = logits.shape
    check_tensor("token_bitmask", token_bitmask)
    words, shape = -(-V // 32), tuple(token_bitmask.shape)
    if token_bitmask.dtype != torch.int32 or len(shape) != 2 or shape[0] != B or shape[1] < words:
        raise ValueError(
            f"token_bitmask must be [{B}, {words}] int32, got {shape} {token_bitmask.dtype}"
        )
    check_device("token_bitmask", token_bitmask, logits)
    return token_bitmask.contiguous()


def given_maxima(maxima: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | None:
    """The checked maxima of sub-tiles, detached, contiguous."""
    if maxima is None:
        return None
    check_tensor("maxima", maxima)
    (B, V), shape = logits.shape, tuple(maxima.shape)
    n, dtype, device = -(-V // SUBTILE), maxima.dtype, maxima.device
    if shape != (B, n) or dtype != torch.float32 or device != logits.device:
        raise ValueError(
            f"maxima must be [{B}, {n}] float32 on {logits.device}, got {shape} {dtype} on {device}"
        )
    return maxima.detach().contiguous()


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
    maxima: torch.Tensor | None = None,
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
        maxima: `[B, ⌈V/256⌉]` fp32 that `subtile_maxima` returns for these logits, bitmask and
            vocab_size, where somebody has them: then most of the logits are not read. NaN counts as
            the +inf that it writes. They are believed: wrong ones give wrong tokens.
        return_logprob, return_kept, return_full_logprob: fill these fields too; the last takes the
            exponential of every logit.
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
    B = logits.shape[0]
    backend = resolve(backend, logits)
    parameters = checked_parameters(
        B,
        logits.device,
        temperature=temperature,
        min_p=min_p,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        position=position,
        stream=stream,
    )
    allowed = allowed_tokens(token_bitmask, logits)
    maxima = given_maxima(maxima, logits)
    want = wanted(return_logprob, return_kept, return_full_logprob)
    # Where there is nothing to trace, the dispatcher would cost as much as the op.
    if tracing(logits):
        out = _sample(logits, *parameters.packed(), allowed, maxima, want, backend)
    else:
        run = implementation(backend, "sample")
        out = run(logits, parameters, allowed=allowed, maxima=maxima, want=want)
    return output_of(out, want)
