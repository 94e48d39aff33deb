"""Decoding without logits: the output embedding hands its input on, and the draw does the product itself.

Only where that is certain to be the same: a plain `nn.Linear` whose output is what the model returns. Whatever stands in
between (a softcap, a logit scale, a slice, a hook of someone else's) is found by one forward of one token, and such models
stay on the path with logits.
"""

from threading import get_ident
from weakref import WeakKeyDictionary

import torch
from torch import nn

from autodeco_fast._generation_hooks import Call, Gate
from autodeco_fast.ops.linear_sample import linear_sample

_HANDS_THROUGH: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models already tried


class _Chosen(torch.Tensor):
    """Scores `[B, V]` of which nothing is stored but where their maxima are."""

    @staticmethod
    def of(token: torch.Tensor, V: int) -> "_Chosen":
        scores = torch.zeros((), device=token.device).expand(len(token), V).as_subclass(_Chosen)
        scores.token = token
        return scores

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.argmax, torch.Tensor.argmax):
            return args[0].token
        return super().__torch_function__(func, types, args, kwargs or {})


class LinearHead:
    """The output embedding of an attached model, switched to handing its input on while a call says so."""

    def __init__(self, model: nn.Module, embedding: nn.Module, head: nn.Module, gate: Gate):
        self.model, self.embedding, self.head, self.gate = model, embedding, head, gate
        self._own = embedding.__dict__.get("forward")  # set by accelerate, say
        original = embedding.forward

        def forward(hidden, *args, **kwargs):
            if gate.open and gate.linear:
                return hidden
            return original(hidden, *args, **kwargs)

        embedding.forward = forward

    def remove(self) -> None:
        if self._own is None:
            del self.embedding.forward
        else:
            self.embedding.forward = self._own

    def usable(self, input_ids: torch.Tensor) -> bool:
        """Whether this model's logits are its output embedding's product and nothing else; tried once for every model."""
        plain = type(self.embedding) is nn.Linear and type(self.embedding.weight) is nn.Parameter
        floating = self.embedding.weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        alone = len(self.embedding._forward_hooks) == 1 and not self.embedding._forward_pre_hooks
        if not (plain and floating and alone) or self.embedding.weight.is_meta:
            return False
        if self.model not in _HANDS_THROUGH:
            if not input_ids.shape[1]:  # the prompt came as embeddings: there is no token to try the model on
                return False
            _HANDS_THROUGH[self.model] = self._hands_through(input_ids[:1, :1])
        return _HANDS_THROUGH[self.model]

    @torch.no_grad()
    def _hands_through(self, ids: torch.Tensor) -> bool:
        caught, me = [], get_ident()

        def catch(_, args):
            if get_ident() == me:  # another thread may be using the model
                caught.append(args[0])

        handle = self.embedding.register_forward_pre_hook(catch)
        try:
            with self.gate.paused():
                logits = self.model(input_ids=ids, use_cache=False).logits
            self.gate.linear = True
            handed = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.gate.linear = False
            handle.remove()
        product = nn.functional.linear(caught[0], self.embedding.weight, self.embedding.bias)
        return (
            logits.shape == product.shape
            and handed.shape == caught[1].shape
            and torch.equal(handed.to(caught[1].dtype), caught[1])
            and torch.allclose(logits.float(), product.float(), rtol=1e-2, atol=1e-2)
        )

    def draw(self, hidden: torch.Tensor, call: Call, position: int | torch.Tensor) -> _Chosen:
        """The scores of the next token, given what entered the output embedding, `[B, H]`."""
        weight = self.embedding.weight
        own = next(self.head.parameters())
        T = self.head(hidden.to(device=own.device, dtype=own.dtype)).to(weight.device)
        position = position.to(weight.device) if isinstance(position, torch.Tensor) else position
        options = {"bias": self.embedding.bias, "min_p": call.min_p, "seed": call.seed, "position": position}
        token = linear_sample(hidden.to(device=weight.device, dtype=weight.dtype), weight, T, **options).token
        return _Chosen.of(token.to(hidden.device), len(weight))
