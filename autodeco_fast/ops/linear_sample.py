"""`linear_sample`: hidden states to tokens, through the LM head, without its logits in memory."""

from collections.abc import Sequence

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.lm_head import transform_
from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.ops.checks import (
    FINITE,
    check_number,
    check_product,
    check_softcap,
    shown,
    unit_stride,
)
from autodeco_fast.ops.sample import (
    checked_parameters,
    fake_sampled,
    filled,
    output_of,
    sample,
    tracing,
    wanted,
)
from autodeco_fast.quantized_head import QuantizedLMHead
from autodeco_fast.sampling import SampleOutput, SamplingParameters

FUSED_ROWS = 32  # Triton: rows up to which the kernel is chosen
QUANTIZED_WIDTH = 1 << 15  # Triton: a program holds a row of hidden states; H·127² fits 32 bits
FUSED_BYTES = 1 << 26  # torch: logits from which they are made in chunks


def fused_pays(rows: int, vocabulary: int, backend: str) -> bool:
    """Whether the fused product is chosen over the vendor's product followed by `sample`.

    Triton, from counts (`bench/linear_sample_tiles.py`): up to 32 rows both products wait for the
    weight, 2·H·V bytes in bf16, and the logits' trip to memory and back, 2·4·B·V, is what can be
    saved. At 64 rows tiles read x and the weight out of the second level for longer than the weight
    takes to arrive. Not measured on a GPU.

    torch: chunks bound the memory. At 256 rows they save a tenth of the time, at 64 they cost a
    third in bf16 (`bench/test_linear_sample.py`): they begin where the logits take 64 MB.
    """
    return rows <= FUSED_ROWS if backend == "triton" else 4 * rows * vocabulary > FUSED_BYTES


def quantized_pays(
    hidden: torch.Tensor, head: QuantizedLMHead, parameters: SamplingParameters
) -> bool:
    """Triton: whether the 8-bit copy is read first.

    Up to as many rows as the fused product is chosen for, unless the host sees that nothing can be
    ruled out: Min-P 0 and no greedy T. Predicted by `bench/quantized_head_tiles.py` for logits like
    a language model's, not measured on a GPU.
    """
    T, min_p = parameters.temperature, parameters.min_p
    cut = isinstance(min_p, torch.Tensor) or min_p > 0
    greedy = not isinstance(T, torch.Tensor) and T < GREEDY_BELOW
    return hidden.shape[0] <= FUSED_ROWS and (cut or greedy) and hidden.shape[1] <= QUANTIZED_WIDTH


@torch.library.custom_op("autodeco_fast::linear_sample", mutates_args=())
def _linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    tensors: Sequence[torch.Tensor | None],
    floats: Sequence[float],
    integers: Sequence[int],
    want: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op for the tracer: packed parameters; what is not wanted is empty."""
    parameters = SamplingParameters.unpacked(tensors, floats, integers)
    run = implementation(backend, "linear_sample")
    return filled(run(hidden, weight, bias, logit_scale, softcap, parameters, want=want), hidden)


@_linear_sample.register_fake
def _(hidden, weight, bias, logit_scale, softcap, tensors, floats, integers, want, backend):
    return fake_sampled(hidden, want)


@torch.no_grad()
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor | QuantizedLMHead,
    temperature: float | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    min_p: float | torch.Tensor | None = 0.0,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    seed: int | torch.Tensor,
    position: int | torch.Tensor = 0,
    stream: int | torch.Tensor | None = None,
    token_bitmask: torch.Tensor | None = None,
    return_logprob: bool = False,
    return_kept: bool = False,
    return_full_logprob: bool = False,
    fused: bool | None = None,
    backend: str | None = None,
) -> SampleOutput:
    """`sample` of `z = softcap·tanh(logit_scale·(hidden @ weight.T + bias) / softcap)`, whose
    `[B, V]` need not be in memory.

    The draw is that of `sample` on the same logits. They are rounded to the dtype of `weight`
    before scale and softcap, as a model's are, whether they are made or not; the order of a
    product's sums may differ.

    Args:
        hidden: `[B, H]` what enters the output embedding, bf16, fp16 or fp32.
        weight: `[V, H]` of the same dtype, or a `QuantizedLMHead` of it: then the weight is read
            only where its 8-bit copy cannot rule a token out, and the token is the same; on CPUs,
            where a product's last bit may depend on its column's place, up to that rounding.
        temperature, min_p, top_k, top_p, seed, position, stream, token_bitmask, return_…: as in
            `sample`.
        bias: `[V]` or None.
        logit_scale, softcap: in this order, after the bias.
        fused: True never makes the logits; False makes them with a plain product and calls
            `sample`; None chooses: the plain product for top-k, top-p, bitmasks, logprob and kept,
            and where `fused_pays` says so.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: as `sample`, for `fused=True` with what needs the logits, or for a
            `QuantizedLMHead` with anything but temperature, Min-P, randomness, logprob and kept.
        RuntimeError: as `sample`.
    """
    quantized = weight if isinstance(weight, QuantizedLMHead) else None
    weight = weight if quantized is None else quantized.weight
    check_product(hidden, weight, bias)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    needs_logits = (
        return_logprob or return_kept or any(x is not None for x in (top_k, top_p, token_bitmask))
    )
    if fused and needs_logits:
        raise ValueError(
            "fused must be None or False with top_k, top_p, token_bitmask, return_logprob or "
            "return_kept"
        )
    chosen = resolve(backend, hidden, weight)
    how = dict(temperature=temperature, min_p=min_p, seed=seed, position=position, stream=stream)
    if quantized is not None:
        others = dict(
            bias=bias,
            softcap=softcap,
            top_k=top_k,
            top_p=top_p,
            token_bitmask=token_bitmask,
            return_full_logprob=return_full_logprob or None,
            fused=fused,
            logit_scale=None if scale == 1.0 else scale,
        )
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be left out with a QuantizedLMHead, got {shown(value)}"
                )
        parameters = checked_parameters(hidden.shape[0], hidden.device, **how)
        pays = chosen == "torch" or (
            not needs_logits and quantized_pays(hidden, quantized, parameters)
        )
        if pays and not tracing(hidden):  # else drawn from the weight, with the same token
            run = implementation(chosen, "quantized_linear_sample", module="quantized_head")
            want = wanted(return_logprob, return_kept, False)
            return output_of(run(unit_stride(hidden), quantized, parameters, want=want), want)
    if fused is None:
        fused = not needs_logits and fused_pays(hidden.shape[0], weight.shape[0], chosen)
    if not fused:
        z = torch.nn.functional.linear(hidden, weight, bias)
        if scale != 1.0 or softcap is not None:
            z = transform_(z, scale, softcap)
        asked = dict(
            return_logprob=return_logprob,
            return_kept=return_kept,
            return_full_logprob=return_full_logprob,
        )
        cuts = dict(top_k=top_k, top_p=top_p, token_bitmask=token_bitmask)
        return sample(z, **how, **cuts, **asked, backend=backend)
    parameters = checked_parameters(hidden.shape[0], hidden.device, **how)
    want = wanted(False, False, return_full_logprob)
    bias = None if bias is None else bias.contiguous()
    lm_head = unit_stride(hidden), unit_stride(weight), bias, scale, softcap
    if tracing(hidden):
        out = _linear_sample(*lm_head, *parameters.packed(), want, chosen)
    else:
        out = implementation(chosen, "linear_sample")(*lm_head, parameters, want=want)
    return output_of(out, want)
