"""What ops ask of their inputs, in one line each."""

import math
import numbers
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import torch

from autodeco_fast.numerics import FLOATS, compute_dtype
from autodeco_fast.stats import TokenStats
from autodeco_fast.values import SEEDS

_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
_NUMBERS = (numbers.Real, Decimal, torch.SymInt, torch.SymFloat)
_WHOLE = (numbers.Integral, torch.SymInt)


class Interval(NamedTuple):
    """The values a parameter may have: `low ≤ x ≤ high`, and how that is written where an end is
    open."""

    low: float
    high: float
    text: str


PROBABILITY = Interval(0.0, 1.0, "[0, 1]")
INSIDE = Interval(math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0), "(0, 1)")
_FP32 = torch.finfo(torch.float32)  # what kernels take
_TINY, _LARGEST = _FP32.tiny, _FP32.max
FINITE = Interval(-_LARGEST, _LARGEST, "[-3.4e38, 3.4e38]")
NOT_NEGATIVE = Interval(0.0, _LARGEST, "[0, 3.4e38]")
POSITIVE = Interval(_TINY, _LARGEST, "(0, 3.4e38]")
_SOFTCAP = Interval(
    _TINY, 1e30, "(0, 1e30], or None"
)  # a logit over the softcap must be a normal number
IDS = Interval(-(2**63), 2**63 - 1, "[-2**63, 2**63)")
_SEED = Interval(*SEEDS, "[-2**63, 2**64)")
COUNT = Interval(0, 2**63 - 1, "[0, 2**63)")
SIZE = Interval(1, 2**63 - 1, "[1, 2**63)")


def shown(value: object) -> str:
    """A number or a short string as it is, a tensor by its shape and dtype, anything else by its
    type: one short line."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    if value is not None and not isinstance(value, (str, bool, *_NUMBERS)):
        return f"a value of type {type(value).__name__}"
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def check_number(name: str, value: float, interval: Interval) -> float:
    """A real number of any of Python's and numpy's types in an interval, as a float. NaN is in
    none."""
    number = value
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise ValueError(f"{name} must be a number in {interval.text}, got {shown(value)}")
        number = _float(value)
    if not interval.low <= number <= interval.high:
        raise ValueError(f"{name} must be in {interval.text}, got {shown(value)}")
    return number


def _float(value: numbers.Real | Decimal) -> float:
    try:
        return float(value)
    except (OverflowError, ValueError):  # an integer or a fraction beyond 1e308, a signalling NaN
        return math.nan


def check_integer(name: str, value: int, interval: Interval) -> int:
    """An integer of any of Python's and numpy's types in an interval, as an int."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, _WHOLE):
            raise ValueError(f"{name} must be an integer in {interval.text}, got {shown(value)}")
        value = value if isinstance(value, torch.SymInt) else int(value)
    if not interval.low <= value <= interval.high:
        raise ValueError(f"{name} must be in {interval.text}, got {shown(value)}")
    return value


def check_seed(seed: int) -> int:
    """The 64 bits of a seed, as a signed number.

    The rule of `torch.Generator.manual_seed`: any integer in [−2⁶³, 2⁶⁴), of any of Python's and
    numpy's types; one from 2⁶³ on is the same seed as itself − 2⁶⁴.

    Raises:
        ValueError: for anything else.
    """
    seed = check_integer("seed", seed, _SEED)
    return seed - 2**64 if seed >= 2**63 else seed


def check_choice(name: str, value: object, choices: Sequence) -> None:
    if not (value is None or isinstance(value, str | int)) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}"
        )


def check_tensor(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {shown(value)}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_device(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """A kernel would read another device's memory, or fail there."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the rest, got {value.device}")


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`[N, V]` detached, with neighbouring columns side by side, as kernels read it."""
    x = x.detach() if x.requires_grad else x
    return x if x.stride(1) == 1 else x.contiguous()


def row_parameter(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """`[N]` as backends take it: detached, contiguous, of the compute dtype."""
    return None if x is None else x.detach().to(compute_dtype(like)).contiguous()


def check_softcap(softcap: float | None) -> float | None:
    return None if softcap is None else check_number("softcap", softcap, _SOFTCAP)


def check_plain(weight: torch.Tensor) -> None:
    """Refuses weights of which `weight @ …` is not what its elements say, or is not here."""
    check_tensor("weight", weight)
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(weight, distributed.DTensor):
        raise ValueError(
            "weight must be a plain tensor, got a DTensor: pass weight.full_tensor(), "
            "or each rank's rows to token_stats_partial"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"weight must be a floating-point tensor, got {weight.dtype}: dequantize a quantized "
            "head first"
        )


def check_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """`hidden [N, H]` and `weight [V, H]` of one dtype, `bias [V]` or None."""
    check_tensor("hidden", hidden)
    check_plain(weight)
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or not weight.numel()
    ):
        raise ValueError(
            f"hidden and weight must be [N, H] and [V, H], got shapes {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if hidden.dtype not in dtypes:
        raise ValueError(f"hidden must be {_names(dtypes)}, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight must have the dtype of hidden, got {weight.dtype} and {hidden.dtype}"
        )
    check_device("weight", weight, hidden)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype:
            raise ValueError(
                f"bias must be [{weight.shape[0]}] {hidden.dtype}, got {tuple(bias.shape)} "
                f"{bias.dtype}"
            )
        check_device("bias", bias, hidden)


def check_logits(logits: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    check_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] with V > 0, got shape {tuple(logits.shape)}")
    if logits.dtype not in dtypes:
        raise ValueError(f"logits must be {_names(dtypes)}, got {logits.dtype}")


def check_row(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """`[N]` real numbers, of the rows of `like [N, …]`, where that is."""
    n = like.shape[0]
    check_tensor(name, value)
    if value.shape != (n,):
        raise ValueError(f"{name} must be [{n}], got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    check_device(name, value, like)


def check_stats(stats: TokenStats) -> None:
    if not isinstance(stats, TokenStats):
        raise ValueError(
            f"stats must be TokenStats, of token_stats or logit_stats, got {shown(stats)}"
        )


def check_target(
    target: torch.Tensor, like: torch.Tensor, V: int | None, ignore_index: int
) -> None:
    """`[N]` int64 of the rows of `like [N, …]`, where that is; its values, below V if given, are
    looked at only on a CPU: on a GPU that would be a host sync."""
    n = like.shape[0]
    check_integer("ignore_index", ignore_index, IDS)
    check_tensor("target", target)
    if target.shape != (n,) or target.dtype != torch.int64:
        raise ValueError(f"target must be [{n}] int64, got {tuple(target.shape)} {target.dtype}")
    check_device("target", target, like)
    if not readable(target):
        return
    wrong = target[
        (target != ignore_index) & ((target < 0) | (target >= (IDS.high if V is None else V)))
    ]
    if wrong.numel():
        limits = "≥ 0" if V is None else f"in [0, {V})"
        raise ValueError(f"target ids must be {limits} or {ignore_index}, got {wrong[0].item()}")


def readable(value: torch.Tensor) -> bool:
    """Whether its values may be looked at here: it is on a CPU, and nobody traces."""
    return (
        value.is_cpu
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def tracing(tensor: torch.Tensor) -> bool:
    """Whether an op must go through the dispatcher: a compiler looks on, or the tensor is no plain
    one."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def check_parameter(
    name: str,
    value: float | torch.Tensor,
    interval: Interval | None,
    B: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float | torch.Tensor:
    """A row's parameter as backends take it: a number as it is, that of a tensor which holds one
    and is `readable`, too; another tensor as `[B]` of this dtype, detached and contiguous.

    Values of tensors are compared with the interval where they are `readable`.
    """
    whole = not dtype.is_floating_point
    if not isinstance(value, torch.Tensor):
        if interval is None:
            return check_seed(value)
        check = check_integer if whole else check_number
        return check(name, value, interval)
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")
    is_number = value.dtype in _INTEGERS or (value.is_floating_point() and not whole)
    if value.dtype != dtype and not is_number:
        raise ValueError(
            f"{name} must be {'integers' if whole else 'real numbers'}, got {value.dtype}"
        )
    if value.shape in ((), (1,)) and readable(value):
        return check_parameter(name, value.item(), interval, B, dtype, device)
    row = value.detach() if value.requires_grad else value
    if value.shape != (B,) or value.dtype != dtype or value.device != device:
        if value.shape not in ((), (1,), (B,)):
            raise ValueError(f"{name} must be a scalar or [{B}], got shape {tuple(value.shape)}")
        row = row.to(device=device, dtype=dtype).reshape(-1).expand(B)
    row = row.contiguous()
    if interval is not None and readable(value):
        # On the CPU, where the value came from, whatever the device of the logits.
        values = (row if row.is_cpu else value.detach().to(dtype).reshape(-1).expand(B)).numpy()
        low, high = interval.low, interval.high
        inside = values.min(initial=low) >= low and values.max(initial=high) <= high
        if not inside:  # NaN is neither
            outside = ~((values >= low) & (values <= high))
            got = value.detach().reshape(-1).expand(B)[outside.argmax().item()].item()
            raise ValueError(f"{name} must be in {interval.text}, got {got}")
    return row


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return ", ".join(names[:-1]) + " or " + names[-1]
