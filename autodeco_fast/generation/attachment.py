"""An attached model: its class, and one call of its `generate`.

The model's class is switched to a subclass whose decoding loops open the gate (gate.py): inside
them, and only there, the logits that leave the model are divided by T. In transformers'
sampling loop our sampler is appended as the last logits processor; where nobody else looks at the
logits they are never made (lazy.py). Its noise depends on (seed, position, stream) alone.

What the fused sampler cannot serve (scores or logits asked for, speculative decoding, watermarks,
top-k and the like set in the call) runs on scaled logits with transformers' own sampling step. What
neither can serve raises.
"""

import copy
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from autodeco_fast.causal_lm import embedding_device
from autodeco_fast.generation import loop
from autodeco_fast.generation.copies import COMPILED, plain_state
from autodeco_fast.generation.gate import Call, Gate, Record, Unscaled, install
from autodeco_fast.generation.settings import Plan, plan
from autodeco_fast.policies.base import Policy

_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _refuse_batching(self, *args, **kwargs):
    raise ValueError(
        "continuous batching cannot be used while a policy is attached; detach() first"
    )


def _adaptive(decode: Callable, attachment: "Attachment", is_sample: bool) -> Callable:
    """A decoding loop of the model's class with the gate open.

    Args:
        decode: the loop of the class, a method.
        is_sample: whether it is `_sample`, one token a step; the fused sampler may take it over.
    """
    gate = attachment.gate

    @functools.wraps(decode)  # `generate` reads its parameters
    def run(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        call, processors, config = gate.call, logits_processor, generation_config
        loop_of_base = functools.partial(decode, self, input_ids, synced_gpus=synced_gpus, **kwargs)
        if gate.open or call is None:
            return loop_of_base(
                logits_processor=processors,
                stopping_criteria=stopping_criteria,
                generation_config=config,
                streamer=streamer,
            )
        call.candidates, call.sampled = not is_sample, True
        if call.recorded and call.candidates:
            raise ValueError("record=True needs one token a step, not candidates of several")
        fused = is_sample and call.fused
        if fused:
            processors = [*processors, loop.FusedSampler(call, input_ids, config, kwargs)]
            # The loop takes the argmax of what the fused sampler returns.
            config = copy.copy(config)
            config.do_sample = False
        else:
            processors = loop.unfused(call, processors)
        processors, criteria, streamer = loop.paused(gate, processors, stopping_criteria, streamer)
        with gate.opened(lazy=fused and attachment.lazy):
            return loop_of_base(
                logits_processor=processors,
                stopping_criteria=criteria,
                generation_config=config,
                streamer=streamer,
            )

    return run


def _default_generator(device: torch.device) -> torch.Generator:
    """That which torch draws from on an accelerator."""
    module = torch.get_device_module(device)
    if device.type == "mps":
        return module._get_default_mps_generator()
    return module.default_generators[device.index]


def _attached_class(base: type, attachment: "Attachment") -> type:
    """A subclass of the model's class, under its name, whose `generate` is adaptive."""
    parameters = inspect.signature(base.generate).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]  # without self
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)

    def generate(self, *args, seed=None, stream=None, **kwargs):
        """`generate` of the model's class with a predicted temperature.

        See `autodeco_fast.attach` for `seed` and `stream`.
        """
        if attachment.gate.open:  # a candidate generator asking the same model
            return super(cls, self).generate(*args, **kwargs)
        unnamed, named = (), dict(zip(names, args))
        if takes_any and len(args) > len(names):
            unnamed, named = args, {}
        elif len(args) > len(names) or named.keys() & kwargs:
            return super(cls, self).generate(*args, **kwargs)  # which says what is wrong
        kwargs = named | kwargs
        config = kwargs.pop("generation_config", None)

        def base_generate(config, keywords):
            given = {} if config is None else {"generation_config": config}
            return super(cls, self).generate(*unnamed, **keywords, **given)

        return attachment.generate(
            base_generate, config, kwargs, seed=seed, stream=stream, caller=sys._getframe(1)
        )

    def __reduce_ex__(self, protocol):
        return object.__new__, (base,), plain_state(self)

    def __call__(self, *args, **kwargs):
        """A frame for `torch.compile`, which leaves the hooks of the module that it is given out of
        its graph."""
        return base.__call__(self, *args, **kwargs)

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_autodeco_attachment": attachment,
        "__call__": __call__,
        "generate": generate,
        "_sample": _adaptive(base._sample, attachment, is_sample=True),
        "_assisted_decoding": _adaptive(base._assisted_decoding, attachment, is_sample=False),
        "__reduce_ex__": __reduce_ex__,
    }
    body |= {name: _refuse_batching for name in _BATCHING if hasattr(base, name)}
    cls = type(base.__name__, (base,), body)
    return cls


class Attachment:
    """A policy attached to a model, until `detach()` or the end of the `with` block.

    `policy` is what decides; `records`, with `record=True`, one `(temperature, kept, top_p)` a step
    of the last finished `generate`, `[rows]` each; top_p is None where none is predicted.
    """

    def __init__(self, model: GenerationMixin, policy: Policy, *, fused: bool, record: bool):
        self.model, self.fused, self.record = model, fused, record
        self.gate = Gate()
        self.lazy = False  # whether the model's forward runs with lazy logits: found by `_try`
        self.records: list[Record] = []
        self.embedding = model.get_output_embeddings()
        self._warned = False
        self._warn_of(policy)
        self._running, self._lock = 0, threading.RLock()  # calls of `generate`, in any thread
        self._leaving = False  # whether the last of them detaches
        if self.device.type != "meta":  # offloaded weights are
            policy = policy.to(self.device)
        self.policy = policy
        self._base = type(model)
        self._class = _attached_class(self._base, self)
        self._handles = install(model, self.embedding, policy, self.gate)
        try:
            self._switch_class(self._class)
            self._try()
        except BaseException:
            self.detach()
            raise

    def __repr__(self) -> str:
        name = f"{self._base.__name__}, '{self.policy}'"
        return f"Attachment({name}{'' if self.attached else ', detached'})"

    @property
    def min_p(self) -> float:
        """The policy's Min-P cut."""
        return self.policy.min_p

    @property
    def device(self) -> torch.device:
        """That of the output embedding."""
        return embedding_device(self.model)

    def _warn_of(self, policy: Policy) -> None:
        """Once: a cut other than the one that the head was trained and calibrated for."""
        known = policy.trained_min_p
        if known is not None and policy.min_p != known and not self._warned:
            self._warned = True
            warnings.warn(
                f"min_p={policy.min_p:g}, but the head was trained for {known:g}: its "
                "coverage no longer holds",
                stacklevel=4,
            )

    def _switch_class(self, cls: type) -> None:
        self.model.__class__ = cls
        for name in COMPILED:  # with the other hooks
            self.model.__dict__.pop(name, None)

    @torch.no_grad()
    def _try(self) -> None:
        """A forward of two tokens as the decoding loop runs it, lazy logits if they will do.

        A model that cannot run on ids alone is not refused: every forward of `generate` is checked
        all the same.

        Raises:
            ValueError: if logits leave the model whose hidden state did not pass its output
                embedding.
        """
        if self.device.type == "meta":
            return
        text = self.model.config.get_text_config()
        token = getattr(text, "bos_token_id", None)
        token = token if isinstance(token, int) and 0 <= token < text.vocab_size else 0
        device = getattr(self.model, "device", self.device)
        ids = torch.full((1, 2), token, device=device)
        devices = {p.device for p in self.model.parameters() if p.is_cuda}
        with torch.random.fork_rng(list(devices)):  # dropout, in a model that is being trained
            reads = self.policy.reads_logits or self.policy.cuts_by_row
            for self.lazy in (False,) if reads else (True, False):
                try:
                    with self.gate.opened(lazy=self.lazy):
                        logits = self.model(input_ids=ids).logits
                    float(logits[0, -1, 0])
                    return
                except Unscaled:
                    raise
                except Exception:  # the model asks for more than ids, or looks at storage
                    continue

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def detach(self) -> None:
        """Gives the model back as it was. Doing it twice is harmless.

        Raises:
            RuntimeError: if a `generate` is running, or something else has switched the model's
                class since.
        """
        with self._lock:
            if not self.attached:
                return
            if self._running:
                raise RuntimeError(
                    "detach() came while generate runs, whose remaining tokens would not follow "
                    "the policy: wait for it (join its thread, read its streamer to the end) "
                    "inside the with block"
                )
            if type(self.model) not in (self._class, self._base):
                raise RuntimeError(
                    f"the class of the model was changed after attach(), to {type(self.model)}: "
                    "undo that first"
                )
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._switch_class(self._base)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        """Detaches; after an exception, which goes on, once no `generate` runs any more."""
        with self._lock:
            self._leaving = kind is not None and self._running > 0
            if not self._leaving:
                self.detach()
        if self._leaving and hasattr(error, "add_note"):  # Python 3.11
            error.add_note("a generate still runs: the policy is detached when it has ended")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A call of `generate` runs.

        Raises:
            RuntimeError: if the policy was detached since the call began.
        """
        with self._lock:
            if not self.attached:
                raise RuntimeError("the policy was detached while this generate began: call again")
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._leaving and not self._running:
                    self.detach()

    def generate(
        self,
        base_generate: Callable,
        config: GenerationConfig | None,
        kwargs: dict,
        *,
        seed: Any,
        stream: Any,
        caller: FrameType,
    ):
        """One call of the attached model's `generate`.

        Args:
            base_generate: that of the model's class, of a configuration and keywords.
            config, kwargs: what it was called with.
            seed, stream: of the noise.
            caller: the frame of the call.
        """
        if self.model.get_output_embeddings() is not self.embedding:
            raise RuntimeError(
                "the model's output embedding was replaced after attach(): detach() and attach "
                "again"
            )
        defaults = self.model.generation_config or GenerationConfig()
        p = plan(defaults, config, kwargs, policy=self.policy, fused=self.fused, caller=caller)
        self.records = []
        if not p.sample:
            with self._counted():
                return base_generate(p.generation_config, p.kwargs)
        self._warn_of(p.policy)
        call = self._call(p, seed, stream)
        call.recorded = self.record
        torch_seed = nullcontext()
        if not p.fused and call.seed is not None:
            torch_seed = self._torch_seeded(call.seed, p.kwargs.values())
        with torch_seed, self._counted(), self.gate.called(call):
            output = base_generate(p.generation_config, p.kwargs)
        if not call.sampled:
            raise RuntimeError(
                f"{self._base.__name__}.generate ran no decoding loop of its own, so no token "
                "followed the policy: attach to the language model inside it"
            )
        loop.check_status(call)
        self.records = call.records
        return output

    @staticmethod
    def _call(p: Plan, seed: Any, stream: Any) -> Call:
        """A call with its noise; where no seed is given, the fused sampler's comes from torch.

        Raises:
            ValueError: for a seed or a stream that is none, or that this call cannot use.
        """
        seed = None if seed is None else loop.seeds(seed)
        stream = None if stream is None else loop.streams(stream)
        if not p.fused and (stream is not None or isinstance(seed, torch.Tensor)):
            raise ValueError(
                f"seed a prompt and stream need the fused sampler, which {p.unfused_by} rules out"
            )
        if p.fused and seed is None:
            seed = int(torch.randint(0, 2**63 - 1, ()))
        return Call(
            fused=p.fused, policy=p.policy, seed=seed, stream=stream, temperature=p.temperature
        )

    @contextmanager
    def _torch_seeded(self, seed: int, inputs: Iterable) -> Iterator[None]:
        """torch's default generators under this seed, on the CPU and where the model and its inputs
        are; their states are put back, and those of other devices are left alone."""
        tensors = [x for x in (*self.model.parameters(), *inputs) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.device.type not in ("cpu", "meta")}
        generators = [torch.default_generator, *map(_default_generator, devices)]
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)
