"""Logits over the predicted temperature, where they leave a model of vLLM.

    z' = z / T(h)

and under speculation in vLLM's V1 runner, where nobody can cut later, with the kept set K at z'

    z'_i − C (1 + max z' − z'_i)   for i outside of K, C = 1e4

whose probability is 0 in fp32. It is finite, and it keeps their order and stretches it: masks come
later (structured outputs, allowed tokens), and one that leaves nothing of K leaves the most
probable token that it allows.

h `[R, H]` is what vLLM hands to `compute_logits`, z `[R, V]` what it returns. R is a row a request,
k + 1 rows with k drafted tokens. The loaded model keeps its class and gets a `compute_logits` of
its own in front.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autodeco_fast.policies.base import Cut, Picked, Policy
from autodeco_fast.policies.masking import masked
from autodeco_fast.policies.temperature import divisor

if TYPE_CHECKING:
    from vllm.config import VllmConfig


_DEPTH = 1e4  # over any temperature of a request below 90, e to the minus that is 0 in fp32


class Adaptive:
    """A policy at work on one model, and what it picked last.

    Args:
        cuts_here: whether the policy's cut is made here, since nobody can make it later.
    """

    cut_later: Callable[[torch.Tensor], torch.Tensor] | None = None  # V1: set by who has the rows

    def __init__(self, policy: Policy, *, cuts_here: bool):
        self.policy = policy
        self.cuts_here = cuts_here
        self._picked: Picked | None = None
        self._taken = 0

    @property
    def predicts_top_p(self) -> bool:
        return self.policy.cuts_by_row

    @torch.inference_mode()
    def over_temperature(
        self, hidden: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Logits over T, fp32 and in place where they were fp32; None stays None, which is what
        tensor-parallel ranks have that do not sample.

        Args:
            hidden: `[R, H]`.
            logits: `[R, V]`.
        """
        if logits is None:
            return None
        logits = logits.float()
        picked = self.policy.pick(hidden, logits if self.policy.reads_logits else None)
        self._picked, self._taken = picked.to(logits.device), 0
        logits.div_(divisor(self._picked.temperature))
        if not self.cuts_here:
            return logits
        if self._picked.top_p is not None:
            inside = masked(logits, self.policy.cut(None).at(self._picked.top_p)) > -math.inf
            return push_down_(logits, ~inside)
        return push_down_(logits, below_min_p(logits, _log(self.policy.min_p)))

    def take(self, rows: int) -> Picked:
        """What was picked of the next rows of the last logits: the sampler may ask for them in
        slices.

        Raises:
            RuntimeError: if there are no such rows.
        """
        start, end = self._taken, self._taken + rows
        if self._picked is None or end > len(self._picked.temperature):
            raise RuntimeError(
                f"vLLM samples {rows} rows of logits that did not go through the head"
            )
        self._taken = end
        return Picked(*(each if each is None else each[start:end] for each in self._picked))


def below_min_p(logits: torch.Tensor, log_min_p: torch.Tensor | float) -> torch.Tensor:
    """Where logits are below `max + log_min_p`, `[R, V]` bool.

    Args:
        logits: `[R, V]` fp32.
        log_min_p: a number, or `[R, 1]`; −inf cuts nothing.
    """
    return logits < logits.amax(1, keepdim=True).add_(log_min_p)


def push_down_(logits: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Pushes logits outside a kept set so far down that their probability is 0, in place and in
    their order.

    Args:
        logits: `[R, V]` fp32.
        outside: `[R, V]` bool; never the largest of a row.
    """
    gap = logits.amax(1, keepdim=True) - logits
    return logits.sub_(gap.add_(1).mul_(_DEPTH).masked_fill_(~outside, 0.0))


def cut_top_p_(
    logits: torch.Tensor, top_p: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """Sets logits outside the top-p of `softmax(logits / temperature)` to −inf, in place.

    Args:
        logits: `[R, V]` fp32.
        top_p: `[R]`.
        temperature: `[R]`, positive.
    """
    scaled = logits / temperature[:, None]
    outside = masked(scaled, Cut(top_p=top_p)) == -math.inf
    return logits.masked_fill_(outside, -math.inf)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def attach(
    model: nn.Module, policy: Policy, config: "VllmConfig", *, fused: bool = False
) -> Adaptive:
    """Puts a policy on a loaded model; its heads go to the model's device.

    Args:
        fused: whether this library's sampler is to draw.

    Raises:
        ValueError: if the head reads hidden states of another width, or the server is set up in a
            way in which the policy could not be followed.
    """
    _check_width(model, policy, config)
    if config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError(
            "enable_batch_sharded_sampling cannot be used with a head: ranks would not have the "
            "temperatures of their rows"
        )
    policy = policy.to(next(model.parameters()).device)
    has_processors = config.speculative_config is None or config.use_v2_model_runner
    adaptive = Adaptive(policy, cuts_here=not has_processors)
    if fused:
        from autodeco_fast.serving.vllm_sampler import model_state

        state = model_state(model, config)
        model.get_model_state_cls = lambda: state
    plain = model.compute_logits

    def compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        return adaptive.over_temperature(hidden_states, plain(hidden_states, *args, **kwargs))

    model.compute_logits = compute_logits
    return adaptive


def _check_width(model: nn.Module, policy: Policy, config: "VllmConfig") -> None:
    lm_head = getattr(model, "lm_head", None)
    width = getattr(lm_head, "embedding_dim", None) or config.model_config.get_hidden_size()
    if policy.hidden_size not in (None, width):
        raise ValueError(
            f"the head reads hidden states of width {policy.hidden_size}, the model's have {width}"
        )
