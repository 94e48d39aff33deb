"""Tensors that are made when something looks at them.

While the fused sampler runs, nobody need see the `[B, V]` logits: `linear_sample` samples from what
enters the output embedding. So the embedding gets its input as `_Handed`, whose product is a
`LazyLogits`: a tensor of the logits' shape, dtype and device that remembers how they would be made.
Taking the last position, a copy in fp32 and the division by T keep it lazy; any other operation (a
hook that bans tokens, a softcap, another processor) makes the values and goes on with them, in
place where it acts in place. Nothing therefore has to be known about what stands between the
embedding and the sampler.
"""

import torch
from torch.utils._pytree import tree_map_only

from autodeco_fast.policies.temperature import divisor

_aten = torch.ops.aten


class Lazy(torch.Tensor):
    """A tensor whose values are made on first use, by `_make`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, *_):
        self._made: torch.Tensor | None = None

    @property
    def untouched(self) -> bool:
        """Whether nothing has looked yet."""
        return self._made is None

    def value(self) -> torch.Tensor:
        """The tensor itself; from now on its operations are those of this one."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> torch.Tensor:
        raise AssertionError("a Lazy says how it is made")

    def _still_lazy(self, func, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The result of an operation that needs no values; None if it does."""
        return None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Lazy) and first.untouched:
            lazy = first._still_lazy(func, args, kwargs)
            if lazy is not None:
                return lazy
        real_args, real_kwargs = tree_map_only(Lazy, Lazy.value, (args, kwargs))
        out = func(*real_args, **real_kwargs)
        return first if isinstance(first, Lazy) and out is first._made else out

    # These read the storage without an operation.
    def numpy(self, **kwargs):
        return self.value().numpy(**kwargs)

    def tolist(self):
        return self.value().tolist()

    def data_ptr(self) -> int:
        return self.value().data_ptr()

    def __repr__(self) -> str:
        return repr(self.value())

    def __reduce_ex__(self, protocol):
        return self.value().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.value().clone()


class LazyLogits(Lazy):
    """`(h Wᵀ + b) / T`, `[..., V]`; not divided, and in the dtype of W, where no T is given."""

    @staticmethod
    def __new__(cls, hidden, embedding, temperature=None, dtype=None, view=None):
        V, dtype = len(embedding.weight), dtype or embedding.weight.dtype
        return Lazy.__new__(cls, (*hidden.shape[:-1], V), dtype, hidden.device)

    def __init__(self, hidden, embedding, temperature=None, dtype=None, view=None):
        """
        Args:
            hidden: `[..., H]`.
            embedding: the `nn.Linear` of W and b.
            temperature: `[...]` fp32; then the dtype must be fp32.
            dtype: what the product is converted to.
            view: (logits, operation, arguments) of which these are a view.
        """
        super().__init__()
        self.hidden, self.embedding = hidden, embedding
        self.temperature, self._view = temperature, view

    @property
    def untouched(self) -> bool:
        return self._made is None and (self._view is None or self._view[0].untouched)

    def _make(self) -> torch.Tensor:
        if self._view is not None:
            source, func, args = self._view
            return func(source.value(), *args)
        weight, bias = self.embedding.weight, self.embedding.bias
        logits = torch.nn.functional.linear(self.hidden, weight, bias).to(self.dtype)
        return logits if self.temperature is None else logits / divisor(self.temperature)

    def divided(self, temperature: torch.Tensor) -> "LazyLogits":
        """Over `temperature [...]`, in fp32."""
        return self._with(temperature=temperature, dtype=torch.float32)

    def _with(self, **changes) -> "LazyLogits":
        """These logits, otherwise made."""
        made = {"hidden": self.hidden, "temperature": self.temperature, "dtype": self.dtype}
        return LazyLogits(embedding=self.embedding, **{**made, **changes})

    def _still_lazy(self, func, args, kwargs):
        if func is _aten._to_copy.default:
            asked = {name: value for name, value in kwargs.items() if value is not None}
            dtype, device = asked.pop("dtype", self.dtype), asked.pop("device", self.device)
            asked.pop("non_blocking", None)
            moved = torch.device(device) != self.device
            if asked or moved or dtype not in (self.dtype, torch.float32):
                return None
            return self._with(dtype=dtype)
        if func in (_aten.alias.default, _aten.detach.default):
            return self._viewed(func, ())
        if func is _aten.slice.Tensor and self._is_whole(*args[1:]):
            return self
        if func in (_aten.select.int, _aten.slice.Tensor):
            dim = args[1] % self.dim()
            return None if dim == self.dim() - 1 else self._viewed(func, (dim, *args[2:]))
        return None

    def _is_whole(
        self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> bool:
        return not start and (end is None or end >= self.shape[dim]) and step == 1

    def _viewed(self, func, args: tuple) -> "LazyLogits":
        T = None if self.temperature is None else func(self.temperature, *args)
        return self._with(hidden=func(self.hidden, *args), temperature=T, view=(self, func, args))


class OneHot(Lazy):
    """Scores `[B, V]` of which one a row is 0 and the others −inf."""

    @staticmethod
    def __new__(cls, token: torch.Tensor, V: int):
        return Lazy.__new__(cls, (len(token), V), torch.float32, token.device)

    def __init__(self, token: torch.Tensor, V: int):
        super().__init__()
        self.token = token

    def _make(self) -> torch.Tensor:
        scores = torch.full(self.shape, float("-inf"), device=self.token.device)
        return scores.scatter_(1, self.token[:, None], 0.0)

    def _still_lazy(self, func, args, kwargs):
        if func is _aten.argmax.default and args[1:] in ((-1,), (1,)) and not kwargs:
            return self.token
        return None


class _Handed(torch.Tensor):
    """What enters the output embedding: a tensor whose product with that weight is lazy."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and isinstance(args[0], _Handed):
            hidden, weight, *bias = args
            embedding = hidden.embedding
            same_bias = not bias or bias[0] is embedding.bias
            if weight is embedding.weight and same_bias and not kwargs:
                return LazyLogits(hidden.source, embedding)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return self.source.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.source.clone()


def can_stay_lazy(embedding: torch.nn.Module, hidden: torch.Tensor) -> bool:
    """Whether the product of this output embedding is one that `linear_sample` can take over."""
    weight = getattr(embedding, "weight", None)
    return (
        type(embedding) is torch.nn.Linear
        and type(weight) is torch.nn.Parameter
        and type(hidden) is torch.Tensor
        and hidden.dtype == weight.dtype
        and hidden.device == weight.device
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def handed(hidden: torch.Tensor, embedding: torch.nn.Linear) -> torch.Tensor:
    """`hidden`, so marked that `embedding(hidden)` is lazy."""
    marked = hidden.as_subclass(_Handed)
    marked.source, marked.embedding = hidden, embedding
    return marked
