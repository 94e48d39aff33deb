"""Hooks that divide a model's logits by the predicted temperature; the gate that lets them act.

A forward of the attached model's decoding loop goes through three hooks:

    enter   on the model      a forward begins
    read    on the embedding  h is what enters it: T(h); its product is lazy if the sampler makes it
    leave   on the model      z = the logits, whatever scale or cap they went through: z / T

A policy that makes T of the logits too is asked in `leave`. Dividing where the logits leave the
model asks nothing of what stands in between. A forward that did not go through `read` raises: its
logits would not be scaled.
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from autodeco_fast.generation import lazy
from autodeco_fast.generation.copies import CopiedPlain, NotCopied
from autodeco_fast.policies.base import Picked, Policy
from autodeco_fast.policies.masking import masked
from autodeco_fast.policies.temperature import divisor


class Unscaled(ValueError):
    """Logits that could not be divided by the temperature of their own hidden state."""


class Record(NamedTuple):
    """One step of a call: what each row's token was drawn under."""

    temperature: torch.Tensor  # [rows] fp32: the policy's times that of the call
    kept: torch.Tensor  # [rows] int64: tokens of the kept set
    top_p: torch.Tensor | None = None  # [rows] fp32, where the policy predicts it


@dataclass
class Call:
    """One running `generate`."""

    fused: bool
    policy: Policy  # of this call: a `min_p` passed in it is its own
    seed: int | torch.Tensor | None  # or [prompts]
    stream: int | torch.Tensor | None  # or [rows]
    temperature: float = 1.0  # a factor on the policy's, applied by a processor of transformers
    sampled: bool = False  # whether a decoding loop ran
    status: torch.Tensor | None = None  # [rows] int32, what the sampler reported so far
    # Whether records are asked for: a graph is guarded by what it looks at, and their number grows.
    recorded: bool = False
    records: list[Record] = field(default_factory=list)  # one a step
    candidates: bool = False  # whether tokens are proposed, so that a forward is of several
    picked: Picked | None = None  # of the last forward, `[rows, positions]` each

    @property
    def top_p(self) -> torch.Tensor | None:
        """The top-p that was picked of each row, `[rows]`; None where none is."""
        top_p = None if self.picked is None else self.picked.top_p
        return None if top_p is None else top_p[:, -1]

    @property
    def greedy(self) -> torch.Tensor:
        """Whether each row takes its largest logit, `[rows]` bool."""
        return self.picked.greedy[:, -1]

    @property
    def masked(self) -> bool:
        """Whether the logits left the model cut: which of several positions a processor is shown it
        cannot know, and each has a top-p of its own."""
        return self.candidates and self.top_p is not None

    def note(self, kept: torch.Tensor) -> None:
        """Records a step whose kept sets are of these sizes, `[rows]`; of a greedy row that is
        1."""
        # Copies: the next replay of a CUDA graph writes into what this one has returned.
        T, top_p = self.picked.temperature[:, -1].clone(), self.top_p
        kept = kept.to(T.device).long()  # the tokens may be elsewhere than the logits
        kept = torch.where(self.greedy, kept.clamp(max=1), kept)
        top_p = None if top_p is None else top_p.clone()
        self.records.append(Record(T * self.temperature, kept, top_p))


class Gate(threading.local):
    """Open while the decoding loop of the attached model runs in this thread, one gate a thread.

    A thread-local rather than a ContextVar: `torch.compile` traces it and guards on it.
    """

    def __init__(self):
        self.open = False
        self.lazy = False  # whether the fused sampler is in charge, so that products may stay lazy
        self.call: Call | None = None
        # One entry a forward that runs: None until something enters the output embedding, then its
        # T, or itself where the policy must see the logits first.
        self.seen: list[Picked | torch.Tensor | None] = []

    @contextmanager
    def _changed(self, **state):
        before = {name: getattr(self, name) for name in state}
        self._set(state)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def called(self, call: Call):
        """A `generate` begins: its call, and a closed gate until its loop runs."""
        return self._changed(call=call, open=False, lazy=False, seen=[])

    def opened(self, *, lazy: bool = False):
        """A decoding loop runs."""
        return self._changed(open=True, lazy=lazy, seen=[])

    def paused(self):
        """Somebody else's code runs inside the loop: it finds the model as it is."""
        return self._changed(open=False, lazy=False, call=None, seen=[])


def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """`logits / T` in fp32."""
    if isinstance(logits, lazy.LazyLogits) and logits.untouched:
        return logits.divided(temperature)
    return logits.float() / divisor(temperature)


def _decided(scaled: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """For other sampling steps than ours, which would draw among tokens that tie: in greedy rows
    the lowest of the largest, nats above the others and by next to nothing in what it was."""
    at = scaled.argmax(-1, keepdim=True)
    top = scaled.gather(-1, at)
    above = torch.where(top.isfinite(), top + top.abs() * 2**-20 + 1e14, top)
    return torch.where(greedy[..., None], scaled.scatter(-1, at, above), scaled)


def _cut(scaled: torch.Tensor, policy: Policy, top_p: torch.Tensor) -> torch.Tensor:
    """Logits over T, `[rows, positions, V]`, −inf outside the cut at a top-p a position."""
    flat = scaled.flatten(0, 1)
    return masked(flat, policy.cut(flat).at(top_p.flatten())).view_as(scaled)


class _Hooks(NotCopied):
    """Those of one attached model."""

    def __init__(self, name: str, embedding: nn.Module, policy: Policy, gate: Gate):
        self.name, self.embedding, self.policy, self.gate = name, embedding, policy, gate

    def enter(self, _, args):
        if self.gate.open:
            self.gate.seen.append(None)

    def read(self, _, args, kwargs):
        gate, policy = self.gate, self.policy
        if not (gate.open and gate.seen):
            return None
        if gate.seen[-1] is not None:
            raise Unscaled(
                f"{self.name} runs its output embedding more than once a forward: which h decides "
                "is not known"
            )
        hidden = args[0] if args else next(iter(kwargs.values()))
        gate.seen[-1] = hidden if policy.reads_logits else policy.pick(hidden)
        if gate.lazy and args and lazy.can_stay_lazy(self.embedding, hidden):
            return (lazy.handed(hidden, self.embedding), *args[1:]), kwargs
        return None

    def leave(self, _, args, output):
        if not self.gate.open:
            return None
        seen = self.gate.seen.pop()
        logits = output[0] if isinstance(output, tuple) else output.logits
        picked, call = self._picked(seen, logits), self.gate.call
        scaled = _scaled(logits, picked.temperature)
        if call is not None:
            call.picked = picked
            if not call.fused:
                scaled = _decided(scaled, picked.greedy)
            if call.masked:
                scaled = _cut(scaled, call.policy, picked.top_p)
        if isinstance(output, tuple):
            return (scaled, *output[1:])
        output.logits = scaled
        return output

    def _picked(self, seen: Picked | torch.Tensor | None, logits: torch.Tensor) -> Picked:
        """What is picked of each row of logits, on their device.

        Raises:
            Unscaled: if they are not those of the hidden states that were seen.
        """
        if seen is None:
            raise Unscaled(
                f"{self.name} makes its logits without its output embedding: they cannot be scaled "
                "by T(h)"
            )
        reads = self.policy.reads_logits
        rows = seen.shape[:-1] if reads else seen.temperature.shape
        if rows != logits.shape[:-1]:
            raise Unscaled(
                f"{self.name} has {tuple(rows)} hidden states and "
                f"{tuple(logits.shape[:-1])} rows of logits in a forward: which h decides is not "
                "known"
            )
        picked = self.policy.pick(seen, logits) if reads else seen
        return picked.to(logits.device)


def install(model: nn.Module, embedding: nn.Module, policy: Policy, gate: Gate) -> list:
    """Registers the hooks and returns their handles; they are removed in this order.

    Args:
        embedding: the output embedding, `h [..., H] → logits [..., V]`.
    """
    hooks = _Hooks(type(model).__name__, embedding, policy, gate)
    return [
        model.register_forward_pre_hook(hooks.enter),
        embedding.register_forward_pre_hook(hooks.read, with_kwargs=True),
        model.register_forward_hook(hooks.leave, prepend=True),
        CopiedPlain(embedding),
    ]
