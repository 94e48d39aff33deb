"""Adaptive decoding for frozen causal language models: a head predicts every token's temperature,
Min-P cuts, one draw picks.

Public names are imported on first use, so `import autodeco_fast` costs little more than
`import torch`.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "TemperatureHead": "heads",
    "TopPHead": "heads",
    "TokenStats": "ops.logit_stats",
    "logit_stats": "ops.logit_stats",
    "token_stats": "ops.token_stats",
    "TokenStatsPartial": "ops.stats_partials",
    "target_logits": "ops.stats_partials",
    "token_stats_partial": "ops.stats_partials",
    "merge_token_stats": "ops.stats_partials",
    "required_temperature": "losses",
    "goldilocks_mask": "losses",
    "min_p_hinge_loss": "losses",
    "autodeco_temperature_loss": "autodeco_losses",
    "soft_top_p_loss": "autodeco_losses",
    "ProbStats": "ops.prob_stats",
    "prob_stats": "ops.prob_stats",
    "SampleOutput": "ops.min_p_sample",
    "sample": "ops.min_p_sample",
    "linear_sample": "ops.linear_sample",
    "SamplePartial": "ops.partials",
    "sample_partial": "ops.partials",
    "merge_partials": "ops.partials",
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
