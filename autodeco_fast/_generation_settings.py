"""What a call of `generate` on an attached model chose, what it merely inherits, and what is refused."""

import copy
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

# The settings that sharpen or cut a distribution, at the values where they do nothing.
NEUTRAL: dict[str, float | None] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
PIPELINE_TEMPERATURE = 0.7  # what pipeline("text-generation") adds by itself

_REFUSED: dict[str, tuple[Any, str]] = {
    "num_beams": (lambda v: v > 1, "beam search does not sample from softmax(z/T)"),
    "num_beam_groups": (lambda v: v > 1, "beam search does not sample from softmax(z/T)"),
    "guidance_scale": (lambda v: v != 1, "guidance mixes the logits of two forwards with different temperatures"),
    "sequence_bias": (bool, "a bias added to logits does not commute with dividing them by a temperature"),
    "penalty_alpha": (bool, "contrastive search does not sample"),
    "dola_layers": (lambda v: True, "DoLa contrasts logits of other layers, which the head does not know"),
    "constraints": (bool, "constrained beam search does not sample from softmax(z/T)"),
    "force_words_ids": (bool, "constrained beam search does not sample from softmax(z/T)"),
    "assistant_early_exit": (lambda v: True, "the head does not know the hidden states of other layers"),
    "use_mtp": (bool, "the head does not know the hidden states of multi-token prediction layers"),
    "custom_generate": (lambda v: True, "a decoding loop of its own would drop the sampler"),
    "cache_implementation": (lambda v: v == "paged", "continuous batching is not supported"),
}
# Asked for in a call, these need transformers' own sampling step on scaled logits.
_UNFUSED = ("output_scores", "output_logits", "prompt_lookup_num_tokens", "assistant_model", "watermarking_config")


@dataclass
class Plan:
    """How one call will run."""

    sample: bool  # False: the caller asked for greedy decoding
    fused: bool
    min_p: float
    generation_config: GenerationConfig | None
    kwargs: dict[str, Any]


def _filled_in(config: GenerationConfig) -> bool:
    """Whether transformers filled this object with defaults, as its pipelines do: a value may be nobody's choice."""
    return None not in (config.num_beams, config.length_penalty, config.repetition_penalty, config.early_stopping)


def _chosen(name: str, kwargs: dict, config: GenerationConfig | None, own: GenerationConfig) -> Any:
    """The value this call itself chose for a sampling setting; None if it is inherited or has no effect."""
    value = kwargs.get(name)
    if value is None and config is not None:
        value = getattr(config, name, None)
        inherited = [getattr(own, name, None)]
        if _filled_in(config):
            inherited += [config._get_default_generation_params().get(name)]
            inherited += [PIPELINE_TEMPERATURE] if name == "temperature" else []
        if value in inherited:
            value = None
    return None if value == NEUTRAL[name] else value


def plan(own: GenerationConfig, config: GenerationConfig | None, kwargs: dict, *, min_p: float, fused: bool) -> Plan:
    """Decides how a call runs.

    Args:
        own: the model's generation configuration; its sampling settings are ignored.
        config, kwargs: what the caller passed. A sampling setting in `config` equal to the model's own is inherited.
        min_p, fused: as attached.

    Raises:
        ValueError: for settings that adaptive decoding cannot honour.
    """

    def effective(name: str) -> Any:
        for value in (kwargs.get(name), getattr(config, name, None), getattr(own, name, None)):
            if value is not None:
                return value
        return None

    for name, (is_set, why) in _REFUSED.items():
        value = effective(name)
        if value is not None and is_set(value):
            raise ValueError(f"{name} cannot be used while a temperature head is attached: {why}; detach() first")

    asked = kwargs.get("do_sample")
    if asked is None and config is not None and config is not own and not _filled_in(config):
        asked = config.do_sample
    if asked is False:
        return Plan(False, False, min_p, config, kwargs)

    chosen = {name: _chosen(name, kwargs, config, own) for name in NEUTRAL}
    if kwargs.get("min_p") is not None:
        chosen["min_p"] = kwargs["min_p"]
    min_p = min_p if chosen["min_p"] is None else chosen["min_p"]
    others = [name for name, value in chosen.items() if value is not None and name != "min_p"]
    fused = fused and not others and not any(effective(name) for name in _UNFUSED)

    settings = {name: NEUTRAL[name] if value is None else value for name, value in chosen.items()}
    settings |= {"do_sample": True, "min_p": None if fused or min_p == 0 else min_p}
    settings = {name: value for name, value in settings.items() if hasattr(own, name)}
    kwargs = {name: value for name, value in kwargs.items() if name not in settings}
    if config is None:
        return Plan(True, fused, min_p, None, kwargs | settings)
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    # An unset entry would be filled from the model's configuration; only an argument can say "none".
    unset = {name: None for name, value in settings.items() if value is None and getattr(own, name) is not None}
    return Plan(True, fused, min_p, config, kwargs | unset)
