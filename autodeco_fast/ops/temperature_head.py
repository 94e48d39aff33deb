"""`temperature_head`: hidden states to temperatures, differentiable in the weights (and in the
hidden states if asked)."""

import torch
from torch.autograd.function import once_differentiable

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.numerics import ALL_FLOATS, compute_dtype, without_autocast
from autodeco_fast.ops.checks import POSITIVE, check_device, check_number, check_tensor, tracing
from autodeco_fast.ops.eager import eager


def _forward(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    max_temperature: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T `[N]`, and the hidden layer if the torch backend keeps it for the backward, else
    nothing."""
    forward = implementation(backend, "head_forward", module="temperature_head")
    with without_autocast(hidden):
        return forward(hidden, w1, b1, w2, b2, max_temperature)


_head = torch.library.custom_op("autodeco_fast::temperature_head", _forward, mutates_args=())


@_head.register_fake
def _(hidden, w1, b1, w2, b2, max_temperature, backend):
    N, dtype = hidden.shape[0], compute_dtype(hidden)
    keeps = implementation(backend, "keeps", module="temperature_head")
    layer = N if keeps(N) else 0
    return hidden.new_empty(N, dtype=dtype), hidden.new_empty(layer, w1.shape[0], dtype=dtype)


def _gradients(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    T: torch.Tensor,
    layer: torch.Tensor,
    max_temperature: float,
    need_hidden: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    backward = implementation(backend, "head_backward", module="temperature_head")
    with without_autocast(hidden):
        return backward(grad, hidden, w1, b1, w2, T, layer, max_temperature, need_hidden)


_head_backward = torch.library.custom_op(
    "autodeco_fast::temperature_head_backward", _gradients, mutates_args=()
)


@_head_backward.register_fake
def _(grad, hidden, w1, b1, w2, T, layer, max_temperature, need_hidden, backend):
    dtype = compute_dtype(hidden)
    dh = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    return (
        w1.new_empty(w1.shape, dtype=dtype),
        *(b.new_empty(b.shape, dtype=dtype) for b in (b1, w2, b1[:1])),
        dh,
    )


def _setup(ctx, inputs, output):
    hidden, w1, b1, w2, b2, ctx.max_temperature, ctx.backend = inputs
    ctx.save_for_backward(hidden, w1, b1, w2, *output)
    ctx.b2_dtype = b2.dtype


@once_differentiable
def _autograd(ctx, grad, _):
    hidden, w1, b1, w2, T, layer = ctx.saved_tensors
    need_hidden = ctx.needs_input_grad[0]
    gradients = _head_backward if tracing(grad) else _gradients
    dw1, db1, dw2, db2, dh = gradients(
        grad.contiguous(),
        hidden,
        w1,
        b1,
        w2,
        T,
        layer,
        ctx.max_temperature,
        need_hidden,
        ctx.backend,
    )
    dh = dh if need_hidden else None
    return (
        dh,
        dw1.to(w1.dtype),
        db1.to(b1.dtype),
        dw2.to(w2.dtype),
        db2.to(ctx.b2_dtype),
        None,
        None,
    )


_head.register_autograd(_autograd, setup_context=_setup)
_eager = eager(_forward, _setup, _autograd)


def temperature_head(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    max_temperature: float = 2.0,
    backend: str | None = None,
) -> torch.Tensor:
    """`T = max_temperature · sigmoid(w2 · relu(W1 h + b1) + b2)`.

    Args:
        hidden: `[..., H]` bf16, fp16 or fp32 (fp64 on the torch backend).
        w1, b1, w2, b2: `[F, H]`, `[F]`, `[1, F]`, `[1]`. Triton takes W1 in hidden's dtype; sums
            are fp32.
        backend: None chooses; "triton" or "torch" forces.

    Returns:
        `[...]` fp32 in (0, max_temperature).

    Raises:
        ValueError: if the widths of hidden and w1 differ, or for shapes, dtypes or numbers other
            than these.
        RuntimeError: as `logit_stats`.
    """
    for name, value in (("hidden", hidden), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        check_tensor(name, value)
        if value.dtype not in ALL_FLOATS:
            raise ValueError(
                f"{name} must be bfloat16, float16, float32 or float64, got {value.dtype}"
            )
        check_device(name, value, hidden)
    if w1.dim() != 2 or hidden.dim() == 0:
        raise ValueError(
            f"hidden and w1 must be [..., H] and [F, H], got {tuple(hidden.shape)} and "
            f"{tuple(w1.shape)}"
        )
    F, H = w1.shape
    if hidden.shape[-1] != H:
        raise ValueError(f"hidden has width {hidden.shape[-1]}, the head was made for {H}")
    if b1.shape != (F,) or w2.shape != (1, F) or b2.shape != (1,):
        raise ValueError(
            f"b1, w2, b2 must be [{F}], [1, {F}], [1], got {[tuple(t.shape) for t in (b1, w2, b2)]}"
        )
    rows = hidden.reshape(-1, H)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    chosen = resolve(backend, hidden, w1, b1, w2, b2)
    largest = check_number("max_temperature", max_temperature, POSITIVE)
    w1, b1, w2 = w1.contiguous(), b1.contiguous(), w2.reshape(-1).contiguous()
    given = rows, w1, b1, w2, b2
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    run = _head if tracing(hidden) else _eager if wanted else _forward
    T, _ = run(*given, largest, chosen)
    return T.view(hidden.shape[:-1])
