"""Policies as text: a name and options, `static T=0.7 min_p=0.1`, or `head=FOLDER scale=0.9`."""

import shlex
from dataclasses import MISSING, Field

from autodeco_fast.options import from_text
from autodeco_fast.policies.adaptive_p import AdaptiveP
from autodeco_fast.policies.autodeco import AutoDecoPolicy
from autodeco_fast.policies.base import SHORT, Policy, ordered
from autodeco_fast.policies.entropy import EDT, EntropyRule
from autodeco_fast.policies.fixed import HeadPolicy, Static
from autodeco_fast.policies.rules import MinK, PLess, TopNSigma
from autodeco_fast.values import require

KINDS: dict[str, type[Policy]] = {
    each.kind: each for each in (Static, TopNSigma, PLess, MinK, EntropyRule, EDT, AdaptiveP)
}
LOADED: dict[str, type[HeadPolicy | AutoDecoPolicy]] = {
    each.kind: each for each in (HeadPolicy, AutoDecoPolicy)
}
_IN_FOLDER = ("head", "top_p_head", "folder")


def parse(text: str) -> Policy:
    """The policy that a text says: `str` of a policy, or with options in any order.

    `greedy`, `static T=0.7 min_p=0.1`, `static T=1 top_p=0.9`, `head=FOLDER scale=0.9 t_min=0.2`,
    `autodeco=FOLDER`, `top_n_sigma n=1 T=1.5`, `p_less`, `min_k tau=3`, `entropy a=0.5 power=0.5`,
    `edt t0=0.8 theta=0.1`, `adaptive_p target=0.5`. Every policy takes `min_p`, `scale`, `t_min`
    and `t_max`.

    Raises:
        ValueError: on one line, naming the text; of an unknown policy or option it lists those
            there are.
    """
    require(isinstance(text, str), "policy", text, "a text like 'static T=0.7 min_p=0.1'")
    try:
        words = shlex.split(text)
        return _parsed(words)
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from None


def _parsed(words: list[str]) -> Policy:
    kind, _, folder = words[0].partition("=") if words else ("", "", "")
    if kind in LOADED:
        if not folder:
            raise ValueError(f"{kind} is written {kind}=FOLDER")
        return LOADED[kind].load(folder, **_options(LOADED[kind], words[1:]))
    if kind == "greedy":
        if words != ["greedy"]:
            raise ValueError("greedy takes no options")
        return Static(temperature=0.0)
    if not words or words[0] not in KINDS:
        names = ", ".join(sorted([*KINDS, "greedy", *(f"{kind}=FOLDER" for kind in LOADED)]))
        raise ValueError(f"the name must be one of {names}")
    options = _options(KINDS[kind], words[1:])
    for each in ordered(KINDS[kind]):
        if each.default is MISSING and each.name not in options:
            raise ValueError(f"{kind} needs {_written(each)}")
    return KINDS[kind](**options)


def _options(policy: type[Policy], words: list[str]) -> dict:
    """Options by field name, each given once."""
    fields = [each for each in ordered(policy) if each.name not in _IN_FOLDER]
    known = {_written(each): each for each in fields}
    options = {}
    for word in words:
        name, is_given, value = word.partition("=")
        if not is_given or name not in known:
            raise ValueError(f"options are {', '.join(known)}, each NAME=VALUE, got {word!r}")
        each = known[name]
        if each.name in options:
            raise ValueError(f"{name} is given twice")
        options[each.name] = from_text(each, value)
    return options


def _written(each: Field) -> str:
    return SHORT.get(each.name, each.name)
