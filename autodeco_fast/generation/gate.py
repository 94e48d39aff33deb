"""Hooks that divide a model's logits by the predicted temperature; the gate that lets them act.

A forward of the attached model's decoding loop goes through three hooks:

    enter   on the model      a forward begins
    read    on the embedding  h is what enters it: T(h); its product is lazy if the sampler makes it
    leave   on the model      z = the logits, whatever scale or cap they went through: z / T(h)

Dividing where the logits leave the model asks nothing of what stands in between. A forward that did
not go through `read` raises: its logits would not be scaled.
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from autodeco_fast.generation import lazy
from autodeco_fast.generation.temperature import divisor, predicted


class Unscaled(ValueError):
    """Logits that could not be divided by the temperature of their own hidden state."""


@dataclass
class Call:
    """One running `generate`."""

    fused: bool
    min_p: float
    seed: int | torch.Tensor | None  # or [prompts]
    stream: int | torch.Tensor | None  # or [rows]
    sampled: bool = False  # whether the fused sampler was put in charge
    status: torch.Tensor | None = None  # [rows] int32, what the sampler reported so far


class Gate(threading.local):
    """Open while the decoding loop of the attached model runs in this thread, one gate a thread.

    A thread-local rather than a ContextVar: `torch.compile` traces it and guards on it.
    """

    def __init__(self):
        self.open = False
        self.lazy = False  # whether the fused sampler is in charge, so that products may stay lazy
        self.call: Call | None = None
        # One entry a forward that runs: T of what entered the output embedding, None until then.
        self.temperatures: list[torch.Tensor | None] = []

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
        return self._changed(call=call, open=False, lazy=False, temperatures=[])

    def opened(self, *, lazy: bool = False):
        """A decoding loop runs."""
        return self._changed(open=True, lazy=lazy, temperatures=[])

    def paused(self):
        """Somebody else's code runs inside the loop: it finds the model as it is."""
        return self._changed(open=False, lazy=False, call=None, temperatures=[])


def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """`logits / T` in fp32."""
    temperature = temperature.to(logits.device)
    if isinstance(logits, lazy.LazyLogits) and logits.untouched:
        return logits.divided(temperature)
    return logits.float() / divisor(temperature)


def install(model: nn.Module, embedding: nn.Module, head: nn.Module, gate: Gate) -> list:
    """Registers the hooks and returns their handles.

    Args:
        embedding: the output embedding, `h [..., H] → logits [..., V]`.
    """
    name = type(model).__name__

    def enter(_, args):
        if gate.open:
            gate.temperatures.append(None)

    def read(_, args, kwargs):
        if not (gate.open and gate.temperatures):
            return None
        if gate.temperatures[-1] is not None:
            raise Unscaled(
                f"{name} runs its output embedding more than once a forward: which h decides is "
                "not known"
            )
        hidden = args[0] if args else next(iter(kwargs.values()))
        gate.temperatures[-1] = predicted(head, hidden)
        if gate.lazy and args and lazy.can_stay_lazy(embedding, hidden):
            return (lazy.handed(hidden, embedding), *args[1:]), kwargs
        return None

    def leave(_, args, output):
        if not gate.open:
            return None
        temperature = gate.temperatures.pop()
        logits = output[0] if isinstance(output, tuple) else output.logits
        if temperature is None:
            raise Unscaled(
                f"{name} makes its logits without its output embedding: they cannot be scaled by "
                "T(h)"
            )
        if temperature.shape != logits.shape[:-1]:
            raise Unscaled(
                f"{name} has {tuple(temperature.shape)} hidden states and "
                f"{tuple(logits.shape[:-1])} rows of logits in a forward: which h decides is not "
                "known"
            )
        scaled = _scaled(logits, temperature)
        if isinstance(output, tuple):
            return (scaled, *output[1:])
        output.logits = scaled
        return output

    return [
        model.register_forward_pre_hook(enter),
        embedding.register_forward_pre_hook(read, with_kwargs=True),
        model.register_forward_hook(leave, prepend=True),
    ]
