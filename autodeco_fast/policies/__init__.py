"""Policies: what picks the temperature and the cut of every token.

base.py         what a policy answers: T before the logits leave the model, a cut where one is drawn
fixed.py        a fixed T, or a head's, with fixed Min-P, top-k and top-p
autodeco.py     T and top-p from AutoDeco's two heads
entropy.py      T from the entropy of the row
rules.py        cuts from the row's logits: top-nσ, p-less, Min-k
adaptive_p.py   probabilities near a target, with a memory
masking.py      a cut as −inf, for samplers other than ours
folder.py       the policy of the heads in a folder
text.py         policies written as text, `static T=0.7 min_p=0.1`

All of them draw with `sample` and `linear_sample`; `attach(model, policy)` makes `generate` follow
one.
"""

from autodeco_fast.policies.adaptive_p import AdaptiveP
from autodeco_fast.policies.autodeco import AutoDecoPolicy
from autodeco_fast.policies.base import Cut, Picked, Policy
from autodeco_fast.policies.entropy import EDT, EntropyRule
from autodeco_fast.policies.fixed import HeadPolicy, Static
from autodeco_fast.policies.rules import MinK, PLess, TopNSigma
from autodeco_fast.policies.text import parse

__all__ = [
    "EDT",
    "AdaptiveP",
    "AutoDecoPolicy",
    "Cut",
    "EntropyRule",
    "HeadPolicy",
    "MinK",
    "PLess",
    "Picked",
    "Policy",
    "Static",
    "TopNSigma",
    "parse",
]
