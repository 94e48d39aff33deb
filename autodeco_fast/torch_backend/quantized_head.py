"""Hidden states to tokens on CPUs, through the logits that an 8-bit copy of the LM head cannot rule
out."""

import torch

from autodeco_fast.quantized_head import QuantizedLMHead
from autodeco_fast.sampling import Sampled, SamplingParameters

from .sample import sample


def quantized_linear_sample(
    hidden: torch.Tensor,
    head: QuantizedLMHead,
    parameters: SamplingParameters,
    *,
    want: int = 0,
) -> Sampled:
    """Same arguments and results as `kernels.quantized_head.quantized_linear_sample`; logits are
    rounded to the dtype of the weight. LOGPROB and KEPT may be wanted here."""
    z = head.kept_logits(hidden, parameters.temperature, parameters.min_p)
    return sample(z, parameters, want=want)
