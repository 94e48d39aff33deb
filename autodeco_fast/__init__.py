"""Adaptive decoding for frozen causal language models: a head predicts each token's temperature.

Public names are imported on first use, so `import autodeco_fast` costs little more than
`import torch`.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "TemperatureHead": "heads",
    "TopPHead": "heads",
    "TokenStats": "stats",
    "logit_stats": "ops.logit_stats",
    "token_stats": "ops.token_stats",
    "TokenStatsPartial": "ops.token_stats_partial",
    "target_logits": "ops.token_stats_partial",
    "token_stats_partial": "ops.token_stats_partial",
    "merge_token_stats": "ops.token_stats_partial",
    "required_temperature": "losses.hinge",
    "goldilocks_mask": "losses.selection",
    "goldilocks_weight": "losses.selection",
    "min_p_hinge_loss": "losses.hinge",
    "nucleus_width_loss": "losses.nucleus",
    "linear_nucleus_width_loss": "losses.nucleus",
    "autodeco_temperature_loss": "losses.autodeco",
    "soft_top_p_loss": "losses.autodeco",
    "reward_loss": "losses.rewards",
    "ProbStats": "ops.prob_stats",
    "prob_stats": "ops.prob_stats",
    "SampleOutput": "sampling",
    "sample": "ops.sample",
    "subtile_maxima": "ops.subtile_maxima",
    "linear_sample": "ops.linear_sample",
    "QuantizedLMHead": "quantized_head",
    "SamplePartial": "vocab_parallel",
    "sample_partial": "ops.sample_partial",
    "merge_samples": "ops.sample_partial",
    "Policy": "policies",
    "Static": "policies",
    "HeadPolicy": "policies",
    "EntropyRule": "policies",
    "EDT": "policies",
    "TopNSigma": "policies",
    "PLess": "policies",
    "MinK": "policies",
    "AdaptiveP": "policies",
    "AutoDecoPolicy": "policies",
    "AutoDecoConfig": "autodeco.model",
    "AutoDecoModelForCausalLM": "autodeco.model",
    "Attachment": "generation",
    "attach": "generation",
    "detach": "generation",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
