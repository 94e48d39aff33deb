"""What a hostile user passes, and the rule that a call is served or refused in one line.

`FUZZ_SECONDS=600 python -m pytest tests/test_hostile_samplers.py` looks for ten minutes in each
test instead of at a few examples.
"""

import numbers
import os
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
INTEGERS = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint32, torch.uint64]
REALS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.bool, torch.complex64]
EDGES = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
EDGES += [-(2**63), -(2**63) - 1, 10**400]
_INF, _NAN = float("inf"), float("nan")
NUMBERS = [np.float32(0.5), np.float64("nan"), np.float16(0.25), np.int64(3), np.uint8(1)]
NUMBERS += [np.bool_(True), np.longdouble(0.5), Fraction(1, 3), Fraction(10**400)]
NUMBERS += [Decimal(text) for text in ("0.5", "NaN", "sNaN", "1e999")]
NUMBERS += [0.0, -0.0, 1.0, 1e-45, 5e-324, 1e-3, 1e29, 2e29, 1.7e308, _NAN, _INF, -_INF]
THINGS = ["0.5", "", "a\nb", b"1", [0.5], (1,), {}, {1}, object(), 1j, len, range(3)]
THINGS += [np.array(0.5), np.ones(2), np.array([])]
THINGS += [torch.float32, torch.Size([2]), ..., NotImplemented, type]


def tensor(shape: tuple, dtype: torch.dtype, values: list[float], form: str) -> torch.Tensor:
    """A tensor of these values, repeated, in one of several forms."""
    n = int(np.prod(shape))
    repeated = [values[i % len(values)] for i in range(n)]
    data = torch.tensor(repeated, dtype=torch.float64)
    if dtype in INTEGERS:
        data = data.nan_to_num(0, 127, 0).clamp(0 if not dtype.is_signed else -128, 127)
    x = data.to(dtype).reshape(shape)
    if form == "strided":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if form == "expanded" and x.dim() and len(x):
        return x[:1].expand_as(x)
    if form == "gradient" and x.is_floating_point():
        return x.requires_grad_()
    if form == "sparse" and x.dim() and dtype in REALS:
        return x.to_sparse()
    return x


def tensors(B: int) -> st.SearchStrategy:
    shapes = st.sampled_from([(), (1,), (B,), (B,), (B,), (B + 1,), (B, 1), (0,)])
    values = st.lists(
        st.one_of(st.floats(0.001, 1), st.sampled_from([0.0, 1.0, 2.0, -1.0, 1e30, float("nan")])),
        min_size=1,
    )
    forms = st.sampled_from(["plain", "plain", "strided", "expanded", "gradient", "sparse"])
    return st.builds(tensor, shapes, st.sampled_from([*REALS, *INTEGERS, *OTHERS]), values, forms)


def anything(B: int) -> st.SearchStrategy:
    """Numbers of any type and size, tensors of any shape, and what is neither."""
    whole = st.one_of(st.integers(-3, 5), st.sampled_from(EDGES))
    real = st.one_of(st.floats(0, 1), st.floats(0, 5), st.floats(), st.sampled_from(NUMBERS))
    return st.one_of(
        st.none(), st.booleans(), whole, real, tensors(B), tensors(B), st.sampled_from(THINGS)
    )


def logits_of(
    B: int, V: int, dtype: torch.dtype, form: str, breaks: list, spread: float
) -> torch.Tensor:
    z = torch.randn(B, V, generator=torch.Generator().manual_seed(V)) * spread
    for i, value in enumerate(breaks):
        if B:
            z[i % B, (7 * i) % V] = value
    z = z.clamp(-3e4, 3e4).to(dtype) if dtype == torch.float16 else z.to(dtype)
    if form == "transposed":
        return z.T.contiguous().T
    if form == "strided":
        return torch.stack([z, torch.zeros_like(z)], -1)[..., 0]
    if form == "expanded" and B:
        return z[:1].expand(B, V)
    if form == "gradient" and z.is_floating_point():
        return z.requires_grad_()
    return z


FORMS = st.sampled_from(["plain", "plain", "strided", "transposed", "expanded", "gradient"])
BREAKS = st.lists(st.sampled_from([float("nan"), _INF, -_INF, 3e38, -3e38, 0.0]), max_size=4)
SPREADS = st.sampled_from([0.0, 0.1, 3.0, 30.0])


def mostly(ordinary: st.SearchStrategy, odd: st.SearchStrategy) -> st.SearchStrategy:
    """One in six is odd. (`one_of` would look through both and weigh their branches.)"""

    def pick(i: int) -> st.SearchStrategy:
        return odd if i == 0 else ordinary

    return st.integers(0, 5).flatmap(pick)


def number(value: object, low: float, high: float, whole: bool) -> float | None:
    """The number that a value is, None if it is none in the range."""
    types = numbers.Integral if whole else (numbers.Real, Decimal)
    if isinstance(value, bool) or not isinstance(value, types):
        return None
    try:
        exact = int(value) if whole else float(value)
    except (OverflowError, ValueError):
        return None
    return exact if low <= exact <= high else None


def row(value: object, B: int, low: float, high: float, whole: bool = False) -> list[float] | None:
    """What each of B rows is asked for, by the documentation; None if it must be refused."""
    if not isinstance(value, torch.Tensor):
        one = number(value, low, high, whole)
        return None if one is None else [one if whole else float(np.float32(one))] * B
    if value.layout != torch.strided or value.dtype not in (
        INTEGERS if whole else [*REALS, *INTEGERS]
    ):
        return None
    if tuple(value.shape) not in ((), (1,), (B,)):
        return None
    rows = value.detach().to(torch.int64 if whole else torch.float32).reshape(-1).expand(B).tolist()
    return rows if all(low <= x <= high for x in rows) else None


def vector(value: object, N: int) -> bool:
    """Whether it is `[N]` floats."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return dense and value.shape == (N,) and value.is_floating_point()


def served(call: Callable, odd: set[str]) -> object | None:
    """The result, if no argument is odd; else it must refuse, naming an odd one first."""
    if not odd:
        return call()
    try:
        result = call()
    except (ValueError, RuntimeError) as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text) < 300, text
        assert any(
            text.startswith((f"{name} ", f"{name}, ")) or f" and {name} must" in text
            for name in odd
        ), (text, odd)
        return None
    raise AssertionError(f"{odd} passed: {result}")


def search(strategy: st.SearchStrategy, check: Callable, examples: int, fuzzed: int = 500) -> None:
    """Looks at some examples, the same every time; or for `SECONDS` at new ones.

    Args:
        fuzzed: examples between looks at the clock.
    """
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    fuzz = given(strategy)(check)
    if not SECONDS:
        settings(max_examples=examples, derandomize=True, **quiet)(fuzz)()
        return
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        again = seed(time.time_ns())(given(strategy)(check))
        settings(max_examples=fuzzed, derandomize=False, database=None, **quiet)(again)()
