"""What a call of `generate` on an attached model chose, what it inherits, and what is refused."""

import copy
import sys
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from transformers import GenerationConfig

from autodeco_fast.policies.base import Policy

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
    "token_healing": (
        bool,
        "it adds biases to logits, which does not commute with dividing them by a temperature",
    ),
    "penalty_alpha": (bool, "contrastive search does not sample"),
    "dola_layers": (
        lambda v: True,
        "DoLa contrasts logits of other layers, which no policy knows",
    ),
    "constraints": (bool, "constrained beam search does not sample from softmax(z/T)"),
    "force_words_ids": (bool, "constrained beam search does not sample from softmax(z/T)"),
    "assistant_early_exit": (
        lambda v: True,
        "a policy does not know the hidden states of other layers",
    ),
    "use_mtp": (bool, "a policy does not know the hidden states of multi-token prediction layers"),
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
    policy: Policy  # of the call: with its min_p, if it has one
    generation_config: GenerationConfig | None
    kwargs: dict[str, Any]
    temperature: float = 1.0  # that the call chose: a factor on the policy's
    unfused_by: str | None = None  # what rules the fused sampler out


@dataclass(frozen=True)
class Brought:
    """What a transformers pipeline adds to the calls it makes by itself: nobody's choice."""

    config: GenerationConfig | None = None  # the pipeline's, where it passes one
    users: GenerationConfig | None = None  # of which it passes a copy that it has filled in
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def by(cls, caller: FrameType | None) -> "Brought":
        """Of the pipeline whose method `caller` is; nothing if it is no pipeline's.

        A `generate` in between hands on what it was given: that of a model around this one.
        """
        while caller is not None and caller.f_code.co_name == "generate":
            caller = caller.f_back
        pipelines = sys.modules.get("transformers.pipelines.base")
        pipeline = caller.f_locals.get("self") if pipelines and caller else None
        if pipelines is None or not isinstance(pipeline, pipelines.Pipeline):
            return cls()
        given = dict(getattr(pipeline, "_generate_kwargs", {}))
        while caller is not None and caller.f_locals.get("self") is pipeline:
            given |= caller.f_locals.get("forward_params", {})  # what its user passed
            caller = caller.f_back
        defaults = getattr(pipeline, "_default_generation_config", None)
        values = {
            name: getattr(defaults, name, None)
            for name in ("do_sample", *NEUTRAL)
            if name not in given
        }
        return cls(
            config=getattr(pipeline, "generation_config", None),
            users=given.get("generation_config"),
            values={name: value for name, value in values.items() if value is not None},
        )


@dataclass(frozen=True)
class _Given:
    """Where the settings of a call come from."""

    defaults: GenerationConfig  # the model's
    config: GenerationConfig | None
    kwargs: dict[str, Any]
    brought: Brought

    def effective(self, name: str) -> Any:
        """The value of a setting, whoever set it; None if nobody did."""
        for value in (
            self.kwargs.get(name),
            getattr(self.config, name, None),
            getattr(self.defaults, name, None),
        ):
            if value is not None:
                return value
        return None

    def said(self, name: str) -> Any:
        """What this call itself says of a sampling setting; None if it says nothing, or what it
        has from the pipeline or the model."""
        value, brought = self.kwargs.get(name), self.brought.values
        if value is not None and not (name in brought and value == brought[name]):
            return value
        if self.config is None:
            return None
        value, inherited = getattr(self.config, name, None), []
        if self.config is self.brought.config:  # transformers has filled it in
            inherited += [brought.get(name), _FILLED_IN.get(name)]
        elif self.brought.users is not None and getattr(self.brought.users, name, None) is None:
            inherited.append(brought.get(name))
        if self.config is self.brought.config or self._is_a_copy():
            inherited.append(getattr(self.defaults, name, None))
        return None if value in inherited else value

    def _is_a_copy(self) -> bool:
        """Whether the configuration of the call was made of the model's: it sets all that this
        sets, as one that was begun anew does not, for lack of the tokenizer's ids."""
        if self.config is self.defaults:
            return True
        own = {name for name, value in vars(self.defaults).items() if value is not None}
        own -= {"transformers_version", *(name for name in own if name.startswith("_"))}
        return all(getattr(self.config, name, None) is not None for name in own)

    def chosen(self, name: str) -> Any:
        """What this call itself chose for a sampling setting.

        None if that is inherited or has no effect.
        """
        value = self.said(name)
        return None if value == NEUTRAL[name] else value

    def asks_for_greedy(self) -> bool:
        """Whether this call itself says `do_sample=False`."""
        return self.said("do_sample") is False

    def refuse(self) -> None:
        """Raises ValueError for a setting that adaptive decoding cannot honour."""
        for name, (is_set, why) in _REFUSED.items():
            value = self.effective(name)
            if value is not None and is_set(value):
                raise ValueError(
                    f"{name} cannot be used while a policy is attached: {why}; detach() first"
                )


def _cuts(policy: Policy, chosen: dict) -> dict:
    """The cuts of a policy as settings, but for those that the call chose."""
    cut = policy.cut(None)
    own = {"min_p": cut.min_p or None, "top_k": cut.top_k, "top_p": cut.top_p}
    taken = {"top_k", "top_p"} & {name for name, value in chosen.items() if value is not None}
    return {name: value for name, value in own.items() if value is not None and name not in taken}


def plan(
    defaults: GenerationConfig,
    config: GenerationConfig | None,
    kwargs: dict,
    *,
    policy: Policy,
    fused: bool,
    caller: FrameType | None = None,
) -> Plan:
    """Decides how a call runs.

    Args:
        defaults: the model's generation configuration; its sampling settings are ignored.
        config, kwargs: what the caller passed. Of a configuration that was made of the model's,
            sampling settings equal to the model's are inherited.
        policy, fused: as attached.
        caller: the frame that called `generate`; what a pipeline brings is told by it.

    Raises:
        ValueError: for settings that adaptive decoding cannot honour.
    """
    given = _Given(defaults, config, kwargs, Brought.by(caller))
    given.refuse()
    if given.asks_for_greedy():
        return Plan(False, fused=False, policy=policy, generation_config=config, kwargs=kwargs)

    chosen = {name: given.chosen(name) for name in NEUTRAL}
    if kwargs.get("min_p") is not None:
        chosen["min_p"] = kwargs["min_p"]
    others = [name for name, value in chosen.items() if value is not None and name != "min_p"]
    asked = [*others, *(name for name in _UNFUSED if given.effective(name))]
    fused = fused and not asked
    by = None if fused else asked[0] if asked else "fused=False"
    if policy.remembers and not fused:
        raise ValueError(f"{policy.kind} needs the fused sampler, which {by} rules out")
    policy = _of_call(policy, given, chosen)
    settings = {name: NEUTRAL[name] if value is None else value for name, value in chosen.items()}
    settings |= {"do_sample": True, "min_p": None}
    if not (fused or policy.cuts_by_row):
        settings |= _cuts(policy, chosen)
    settings = {name: value for name, value in settings.items() if hasattr(defaults, name)}
    config, kwargs = _with(settings, given)
    return Plan(
        True,
        fused=fused,
        policy=policy,
        generation_config=config,
        kwargs=kwargs,
        temperature=1.0 if chosen["temperature"] is None else chosen["temperature"],
        unfused_by=by,
    )


def _of_call(policy: Policy, given: _Given, chosen: dict) -> Policy:
    """The policy as it cuts in this call."""
    if chosen["min_p"] is not None:
        policy = replace(policy, min_p=chosen["min_p"])
    for name in ("top_k", "top_p"):  # said to do nothing, they lift the policy's own
        if given.said(name) == NEUTRAL[name] and getattr(policy, name, None) is not None:
            policy = replace(policy, **{name: None})
    factor = chosen["temperature"]
    return policy if factor is None else policy.times(factor)


def _with(settings: dict, given: _Given) -> tuple[GenerationConfig | None, dict]:
    """Configuration and keywords of the call, these settings in place of its own."""
    kwargs = {name: value for name, value in given.kwargs.items() if name not in settings}
    if given.config is None:
        return None, kwargs | settings
    config = copy.deepcopy(given.config)
    for name, value in settings.items():
        setattr(config, name, value)
    # An unset entry would be filled from the model's configuration; only an argument can say
    # "none".
    unset = [name for name, value in settings.items() if value is None]
    return config, kwargs | {
        name: None for name in unset if getattr(given.defaults, name) is not None
    }
