"""Adaptive decoding in Hugging Face's `generate`: `attach(model, head)`.

Two mechanisms, both without state between steps:

* **Scaling.** A hook divides the logits by `T(h)`, `h` being what enters the output embedding, in fp32 and before every
  other logits processor. It acts inside `generate` of the attached model only: a plain forward, with or without labels,
  returns the model's own logits.
* **The fused sampler.** The model's class is switched to a subclass whose `_sample` appends our draw as the last logits
  processor. Where it is the only one and the logits are a plain product, the output embedding hands its input on and
  `linear_sample` draws from that: no logits are made. Elsewhere `sample` draws from scaled logits: at temperature 1 with
  Min-P they are the logits at T with Min-P. Its noise depends on (seed, position, row) alone.

Whatever the fused sampler cannot serve (scores or logits asked for, speculative decoding, watermarks, top-k and the
like set in the call) runs on scaled logits with transformers' own sampling step. Whatever neither can serve raises.
"""

import copy
from contextlib import ExitStack

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from autodeco_fast._generation_hooks import Call, Gate, install
from autodeco_fast._generation_linear import LinearHead
from autodeco_fast._generation_settings import plan
from autodeco_fast.ops.min_p_sample import sample


class _FusedDraw(LogitsProcessor):
    """Last in the list: draws the token and leaves its row one-hot, so that the argmax that follows takes it."""

    def __init__(self, call: Call, linear: LinearHead, start: int | torch.Tensor, length: int):
        self.call, self.linear, self.start, self.length = call, linear, start, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = self.start + (input_ids.shape[1] - self.length)
        if self.linear.gate.linear:
            return self.linear.draw(scores, self.call, position)
        token = sample(scores, 1.0, min_p=self.call.min_p, seed=self.call.seed, position=position).token
        return scores.fill_(float("-inf")).scatter_(1, token[:, None], 0.0)


def _first_position(input_ids: torch.Tensor, mask: torch.Tensor | None) -> int | torch.Tensor:
    """The number of real tokens in each row, so that noise does not depend on left padding."""
    if mask is None or mask.shape != input_ids.shape:
        return input_ids.shape[1]
    return mask.to(input_ids.device).sum(1)


def _refuse_batching(self, *args, **kwargs):
    raise ValueError("continuous batching cannot be used while a temperature head is attached; detach() first")


def _attached_class(base: type, attachment: "Attachment") -> type:
    """A subclass of the model's class, under its name, whose `generate` is adaptive."""

    def generate(self, inputs=None, generation_config=None, *args, seed: int | None = None, **kwargs):
        """`generate` of the model's class with a predicted temperature; `seed` fixes the output."""
        gate = attachment.gate
        if gate.open:  # a candidate generator asking the same model
            return super(cls, self).generate(inputs, generation_config, *args, **kwargs)
        return attachment.generate(self, super(cls, self).generate, inputs, generation_config, args, seed, kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """The sampling loop of the model's class, its draw replaced by the fused sampler when the call allows it."""
        call = attachment.gate.call
        if call is not None and call.fused:
            call.sampled = True
            start = _first_position(input_ids, kwargs.get("attention_mask"))
            attachment.gate.linear = not logits_processor and attachment.linear.usable(input_ids)
            draw = _FusedDraw(call, attachment.linear, start, input_ids.shape[1])
            logits_processor = LogitsProcessorList([*logits_processor, draw])
            generation_config = copy.copy(generation_config)
            generation_config.do_sample = False
        return super(cls, self)._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_autodeco_attachment": attachment,
        "generate": generate,
        "_sample": _sample,
    }
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        if hasattr(base, name):
            body[name] = _refuse_batching
    cls = type(base.__name__, (base,), body)
    return cls


class Attachment:
    """A head attached to a model, until `detach()` or the end of the `with` block."""

    def __init__(self, model: GenerationMixin, head: nn.Module, min_p: float, fused: bool):
        self.model, self.head, self.min_p, self.fused = model, head, min_p, fused
        self.gate = Gate()
        self.embedding = model.get_output_embeddings()
        device = self.embedding.weight.device
        if device.type != "meta":  # offloaded weights are
            head.to(device)
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._handles = install(model, self.embedding, head, self.gate, at_end=bool(softcap))
        self.linear = LinearHead(model, self.embedding, head, self.gate)
        self._handles.append(self.linear)
        self._base = type(model)
        self._switch_class(_attached_class(self._base, self))
        # Set, so that pipelines do not add a temperature of their own.
        self._placed_temperature = model.generation_config.temperature is None
        if self._placed_temperature:
            model.generation_config.temperature = 1.0

    def _switch_class(self, cls: type) -> None:
        self.model.__class__ = cls
        for name in ("_compiled_call", "_last_compile_config"):  # compiled with the other hooks
            self.model.__dict__.pop(name, None)

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def detach(self) -> None:
        """Gives the model back as it was. Doing it twice is harmless."""
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._switch_class(self._base)
        if self._placed_temperature and self.model.generation_config.temperature == 1.0:
            self.model.generation_config.temperature = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def generate(self, model, base_generate, inputs, config: GenerationConfig | None, args, seed, kwargs):
        """One call of the attached model's `generate`."""
        if model.get_output_embeddings() is not self.embedding:
            raise RuntimeError("the model's output embedding was replaced after attach(): detach() and attach again")
        p = plan(model.generation_config, config, kwargs, min_p=self.min_p, fused=self.fused)
        if not p.sample:
            return base_generate(inputs, p.generation_config, *args, **p.kwargs)
        with ExitStack() as stack:
            if p.fused and seed is None:
                seed = int(torch.randint(0, 2**63 - 1, ()))
            elif not p.fused and seed is not None:
                device = self.embedding.weight.device
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                torch.manual_seed(seed)
            call = stack.enter_context(self.gate.entered(Call(p.fused, p.min_p, seed)))
            output = base_generate(inputs, p.generation_config, *args, **p.kwargs)
        if p.fused and not call.sampled:
            raise RuntimeError(f"{self._base.__name__}.generate did not run _sample; attach with fused=False")
        return output


def attach(model: GenerationMixin, head: nn.Module, *, min_p: float = 0.1, fused: bool = True) -> Attachment:
    """Makes `model.generate` adaptive: every token is drawn from `softmax(z / T(h))` cut at Min-P.

    While attached, `generate`
    * samples unless `do_sample=False` is passed, which is plain greedy decoding of the model itself;
    * takes `seed=` (int); without it `torch.manual_seed` fixes the output;
    * ignores the temperature, top-k, top-p and other cuts that the model's generation configuration or a pipeline
      brings, and honours those passed in the call: a temperature multiplies the predicted one, a `min_p` replaces the
      attached one;
    * raises ValueError for beams, guidance, sequence biases, contrastive, DoLa, constrained and custom decoding, and
      continuous batching.

    Logits processors see scaled logits, as do `output_scores` and `output_logits`. A row with T < 1e-3 is greedy. With
    `seed=`, calls that the fused sampler cannot serve seed torch's default generator, which threads share, and put its
    state back.

    Args:
        model: a causal language model of transformers (for PEFT, the model inside).
        head: predicts `T [...]` from `h [..., H]`; moved to the model's device.
        min_p: in [0, 1]; 0 cuts nothing.
        fused: False keeps transformers' own sampling step throughout.

    Returns:
        An `Attachment`: a context manager with `.detach()`.

    Raises:
        TypeError: if `model` cannot generate.
        ValueError: if a head is attached already, the widths differ, the model is no decoder or `min_p` is out
            of range.
    """
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"attach() needs a transformers model that generates, got {type(model).__name__}")
    if hasattr(type(model), "_autodeco_attachment"):
        raise ValueError("a temperature head is attached to this model already; detach() it first")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
    if model.config.is_encoder_decoder:
        raise ValueError("attach() needs a decoder-only model")
    embedding = model.get_output_embeddings()
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no output embedding")
    width = getattr(embedding, "in_features", None) or embedding.weight.shape[-1]
    if width != head.hidden_size:
        raise ValueError(f"the head reads hidden states of width {head.hidden_size}, the model's have {width}")
    return Attachment(model, head, float(min_p), fused)
