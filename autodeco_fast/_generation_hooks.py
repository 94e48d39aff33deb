"""The hooks that divide a model's logits by the predicted temperature, and the gate that lets them act."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

GREEDY_BELOW = 1e-3  # T under this is greedy
GREEDY_DIVISOR = 1e-20  # what such rows are divided by: any two different fp32 logits end up whole nats apart


@dataclass
class Call:
    """One running `generate`."""

    fused: bool
    min_p: float
    seed: int | None
    sampled: bool = False  # whether the fused sampler was put in charge


class Gate(threading.local):
    """Open while the attached model's `generate` runs in this thread; every thread has its own.

    A thread-local rather than a ContextVar: `torch.compile` traces it and guards on it.
    """

    def __init__(self):
        self.open = False
        self.linear = False  # whether the output embedding hands its input on, for the sampler to multiply
        self.call: Call | None = None
        self.pending: list[torch.Tensor] = []  # T on its way from the output embedding to the end of the same forward

    @contextmanager
    def entered(self, call: Call):
        self.open, self.call = True, call
        try:
            yield call
        finally:
            self.open, self.linear, self.call = False, False, None
            self.pending.clear()

    @contextmanager
    def paused(self):
        """Closed for a while."""
        self.open = False
        try:
            yield
        finally:
            self.open = True


def predicted(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What to divide the logits of `hidden [..., H]` by: `[..., 1]` fp32, positive."""
    weight = next(head.parameters())
    T = head(hidden.to(device=weight.device, dtype=weight.dtype)).to(hidden.device)
    return torch.where(T < GREEDY_BELOW, GREEDY_DIVISOR, T).unsqueeze(-1)


def _hidden(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def install(model: nn.Module, embedding: nn.Module, head: nn.Module, gate: Gate, *, at_end: bool) -> list:
    """Registers the hooks and returns their handles.

    Args:
        embedding: the output embedding, `h [..., H] → logits [..., V]`.
        at_end: False divides where the embedding returns (a linear logit scale afterwards commutes with that); True
            divides where the logits leave the model's forward, as a softcap asks for.
    """

    def scale(_, args, kwargs, logits):
        if not gate.open or gate.linear:
            return None
        return logits.float() / predicted(head, _hidden(args, kwargs)).to(logits.device)

    def remember(_, args, kwargs):
        if gate.open:
            gate.pending.append(predicted(head, _hidden(args, kwargs)))

    def scale_at_end(_, args, output):
        if not gate.open:
            return None
        T = gate.pending.pop()
        if isinstance(output, tuple):
            return (output[0].float() / T.to(output[0].device), *output[1:])
        output.logits = output.logits.float() / T.to(output.logits.device)
        return output

    if at_end:
        return [
            embedding.register_forward_pre_hook(remember, with_kwargs=True),
            model.register_forward_hook(scale_at_end),
        ]
    return [embedding.register_forward_hook(scale, with_kwargs=True)]
