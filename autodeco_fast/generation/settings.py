"""What a call of `generate` on an attached model chose, what it merely inherits, and what is
refused."""

import copy
import sys
from dataclasses import dataclass, field
from types import FrameType
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
# What transformers fills unset entries of a pipeline's configuration with.
_FILLED_IN = GenerationConfig._get_default_generation_params()

_REFUSED: dict[str, tuple[Any, str]] = {
    "num_beams": (lambda v: v > 1, "beam search does not sample from softmax(z/T)"),
    "num_beam_groups": (lambda v: v > 1, "beam search does not sample from softmax(z/T)"),
    "guidance_scale": (
        lambda v: v != 1,
        "guidance mixes the logits of two forwards with different temperatures",
    ),
    "sequence_bias": (
        bool,
        "a bias added to logits does not commute with dividing them by a temperature",
    ),
    "penalty_alpha": (bool, "contrastive search does not sample"),
    "dola_layers": (
        lambda v: True,
        "DoLa contrasts logits of other layers, which the head does not know",
    ),
    "constraints": (bool, "constrained beam search does not sample from softmax(z/T)"),
    "force_words_ids": (bool, "constrained beam search does not sample from softmax(z/T)"),
    "assistant_early_exit": (
        lambda v: True,
        "the head does not know the hidden states of other layers",
    ),
    "use_mtp": (bool, "the head does not know the hidden states of multi-token prediction layers"),
    "custom_generate": (lambda v: True, "a decoding loop of its own would drop the sampler"),
    "cache_implementation": (lambda v: v == "paged", "continuous batching is not supported"),
}
# Asked for in a call, these need transformers' own sampling step on scaled logits.
_UNFUSED = (
    "output_scores",
    "output_logits",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "watermarking_config",
)


@dataclass
class Plan:
    """How one call will run."""

    sample: bool  # False: the caller asked for greedy decoding
    fused: bool
    min_p: float
    generation_config: GenerationConfig | None
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Brought:
    """What a transformers pipeline adds to the calls it makes by itself: nobody's choice."""

    config: GenerationConfig | None = None  # its own, where it passes one
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def by(cls, caller: FrameType | None) -> "Brought":
        """Of the pipeline whose method `caller` is; nothing if it is no pipeline's."""
        pipelines = sys.modules.get("transformers.pipelines.base")
        pipeline = caller.f_locals.get("self") if pipelines and caller else None
        if pipelines is None or not isinstance(pipeline, pipelines.Pipeline):
            return cls()
        given = dict(getattr(pipeline, "_generate_kwargs", {}))
        while caller is not None and caller.f_locals.get("self") is pipeline:
            given |= caller.f_locals.get(
                "forward_params", {}
            )  # of Pipeline.forward: what its user passed
            caller = caller.f_back
        defaults = getattr(pipeline, "_default_generation_config", None)
        values = {name: getattr(defaults, name, None) for name in ("do_sample", *NEUTRAL)}
        return cls(
            config=getattr(pipeline, "generation_config", None),
            values={
                name: value
                for name, value in values.items()
                if value is not None and name not in given
            },
        )


def _chosen(
    name: str,
    kwargs: dict,
    config: GenerationConfig | None,
    own: GenerationConfig,
    brought: Brought,
) -> Any:
    """The value this call itself chose for a sampling setting; None if it is inherited or has no
    effect."""
    value = kwargs.get(name)
    inherited = [brought.values[name]] if name in brought.values else []
    if value in inherited:
        value = None
    if value is None and config is not None:
        value = getattr(config, name, None)
        inherited.append(getattr(own, name, None))
        if config is brought.config:  # transformers has filled it in
            inherited.append(_FILLED_IN.get(name))
        if value in inherited:
            value = None
    return None if value == NEUTRAL[name] else value


def _asks_for_greedy(
    kwargs: dict, config: GenerationConfig | None, own: GenerationConfig, brought: Brought
) -> bool:
    """Whether this call itself says `do_sample=False`."""
    asked = kwargs.get("do_sample")
    if asked is None and config is not None and config is not own:
        inherited = config is brought.config and own.do_sample is False
        asked = None if inherited else config.do_sample
    return asked is False


def plan(
    own: GenerationConfig,
    config: GenerationConfig | None,
    kwargs: dict,
    *,
    min_p: float,
    fused: bool,
    caller: FrameType | None = None,
) -> Plan:
    """Decides how a call runs.

    Args:
        own: the model's generation configuration; its sampling settings are ignored.
        config, kwargs: what the caller passed. A sampling setting in `config` equal to the model's
            own is inherited.
        min_p, fused: as attached.
        caller: the frame that called `generate`; what a pipeline brings is told by it.

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
            raise ValueError(
                f"{name} cannot be used while a temperature head is attached: {why}; detach() first"
            )

    brought = Brought.by(caller)
    if _asks_for_greedy(kwargs, config, own, brought):
        return Plan(False, False, min_p, config, kwargs)

    chosen = {name: _chosen(name, kwargs, config, own, brought) for name in NEUTRAL}
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
    # An unset entry would be filled from the model's configuration; only an argument can say
    # "none".
    unset = {
        name: None
        for name, value in settings.items()
        if value is None and getattr(own, name) is not None
    }
    return Plan(True, fused, min_p, config, kwargs | unset)
