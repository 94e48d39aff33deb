"""What single requests ask of the head, and what that does to their rows of logits.

    T'  = clip(t_scale · T, t_min, t_max), 1 for a request that opted out
    z'' = z' · T / T'                         the logits z' = z / T come over T already
    z''_i = −∞ where z''_i < max z'' + t ln min_p, t the request's own temperature

vLLM divides by t afterwards, so the cut is Min-P of the distribution that is drawn from; where it
has done so before, ln min_p takes the place of t ln min_p.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autodeco_fast.options import Options, documented, option
from autodeco_fast.policies.base import Picked, Policy
from autodeco_fast.policies.temperature import divisor
from autodeco_fast.serving.vllm_model import below_min_p, cut_top_p_
from autodeco_fast.values import require

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_RESERVED = "autodeco"  # keys of other plugins do not begin so
_LOG_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FEWEST = 1e-5  # vLLM takes lower temperatures and Min-P for 0


@documented
@dataclass(frozen=True, kw_only=True)
class RequestOptions(Options):
    """Keys of `extra_args`, over HTTP of `vllm_xargs`.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    autodeco: int = option("0 decodes this request as without the head", 1, must_be="0 or 1")
    t_scale: float = option("factor on T", 1.0, must_be="positive")
    t_min: float = option("lowest T, after the factor", 0.0, must_be="≥ 0")
    t_max: float | None = option("highest T, likewise", None, must_be="≥ 0")
    autodeco_min_p: float | None = option(
        "Min-P cut, 0 cuts nothing; None takes the request's `min_p`, or the head's",
        None,
        must_be="in [0, 1]",
    )
    autodeco_log: str | None = option("name of this request in the log of temperatures", None)

    def __post_init__(self):
        super().__post_init__()
        least = self.t_min
        require(self.t_max is None or self.t_max >= least, "t_max", self.t_max, f"≥ t_min {least}")
        key = self.autodeco_log
        expected = "1 to 64 letters, digits, '.', '_' or '-'"
        require(key is None or bool(_LOG_KEY.fullmatch(key)), "autodeco_log", key, expected)

    @property
    def changes_t(self) -> bool:
        return not self.autodeco or (self.t_scale, self.t_min, self.t_max) != (1.0, 0.0, None)


def read_options(params: "SamplingParams") -> RequestOptions:
    """What a request asks for.

    Raises:
        ValueError: on one line, for a key that begins with `autodeco` and is none, a value that is
            none of its, two Min-P, or one name in the log for several completions.
    """
    given: dict[str, Any] = params.extra_args or {}
    known = [each.name for each in fields(RequestOptions)]
    for name in given:
        if name.startswith(_RESERVED) and name not in known:
            raise ValueError(f"vllm_xargs are {', '.join(known)}, got {name!r}")
    own = {name: given[name] for name in known if name in given}
    if isinstance(own.get("autodeco"), bool):  # in process; HTTP has no truth values here
        own["autodeco"] = int(own["autodeco"])
    try:
        options = RequestOptions(**own)
    except ValueError as error:
        raise ValueError(f"vllm_xargs: {error}") from None
    if options.autodeco_min_p is not None and params.min_p:
        raise ValueError(
            f"vllm_xargs: autodeco_min_p {options.autodeco_min_p:g} and min_p {params.min_p:g} are "
            'the same cut: give one; where the server\'s defaults bring min_p, give "min_p": 0 too'
        )
    if options.autodeco_log is not None and params.n > 1:
        raise ValueError(
            f"vllm_xargs: autodeco_log names one completion, got n {params.n}: send a request each"
        )
    return options


@dataclass(frozen=True)
class Row:
    """A request, as its rows of logits are treated."""

    options: RequestOptions
    temperature: float  # the request's own; 0 is greedy
    min_p: float  # of the cut made here, 0 for none

    @classmethod
    def of(cls, params: "SamplingParams", policy: Policy, *, cuts_here: bool) -> "Row":
        """Of a request.

        Args:
            cuts_here: False where the policy's cut was made before.
        """
        options = read_options(params)
        min_p = options.autodeco_min_p
        if min_p is None:
            named = params.min_p > _FEWEST or not options.autodeco
            min_p = 0.0 if named else policy.min_p
        samples = params.temperature > _FEWEST
        cuts = cuts_here and samples
        return cls(options, params.temperature if samples else 0.0, min_p if cuts else 0.0)


class Rows:
    """Requests by their slots in the sampler, as arrays.

    Args:
        slots: how many requests there can be.
        top_p: whether the policy's top-p is cut here.
    """

    _NEUTRAL = (1.0, 1.0, 0.0, math.inf, -math.inf, 0.0, 0.0)

    def __init__(self, slots: int, device: torch.device, *, top_p: bool):
        self.device = device
        self.cuts_top_p = top_p
        self.log_keys: dict[int, str] = {}
        self.changes_t, self.cuts, self.draws = (np.zeros(slots, bool) for _ in range(3))
        self._values = np.tile(np.float32(self._NEUTRAL), (slots, 1))
        self._on_device = torch.tensor(self._values, device=device)
        self._is_stale = False

    def put(self, slot: int, row: Row | None) -> None:
        """A request enters a slot, None leaves it."""
        self.log_keys.pop(slot, None)
        self._is_stale = True
        if row is None:
            self.changes_t[slot] = self.cuts[slot] = self.draws[slot] = False
            self._values[slot] = self._NEUTRAL
            return
        options = row.options
        on, highest = bool(options.autodeco), options.t_max
        cut = row.temperature * math.log(row.min_p) if row.min_p else -math.inf
        self._values[slot] = (
            on,
            options.t_scale,
            options.t_min,
            math.inf if highest is None else highest,
            cut,
            row.temperature if on else 0.0,
            row.min_p,
        )
        self.changes_t[slot] = options.changes_t
        self.cuts[slot] = row.min_p > 0
        self.draws[slot] = on and row.temperature > 0
        if options.autodeco_log is not None and on:
            self.log_keys[slot] = options.autodeco_log

    def upload(self) -> None:
        """Brings what changed to the device."""
        if self._is_stale:
            self._on_device.copy_(torch.from_numpy(self._values))
            self._is_stale = False

    def needs(self, slot: int, *, min_p: bool = True) -> bool:
        """Whether the rows of a slot are changed, or looked at, here.

        Args:
            min_p: whether its Min-P cut counts.
        """
        top_p = self.cuts_top_p and self.draws[slot]
        return bool(self.changes_t[slot] or top_p or slot in self.log_keys) or bool(
            min_p and self.cuts[slot]
        )

    def min_p(self, rows: torch.Tensor) -> torch.Tensor:
        """The Min-P of cuts made here, `[R]`; 0 where there is none."""
        return self._on_device[rows][:, -1]

    def apply(
        self, logits: torch.Tensor, picked: Picked, slots: np.ndarray, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as the requests want them, in place, and their T: `scale`, then `cut`."""
        logits, T = self.scale(logits, picked, slots, rows)
        return self.cut(logits, picked, slots, rows), T

    def scale(
        self, logits: torch.Tensor, picked: Picked, slots: np.ndarray, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the requests' own T, in place, and that T.

        Args:
            logits: `[R, V]` fp32, over T.
            picked: of these rows.
            slots: those in the batch, in any order.
            rows: the slot of each row, `[R]`.
        """
        on, scale, t_min, t_max, *_ = self._on_device[rows].unbind(1)
        T = picked.temperature
        if self.changes_t[slots].any():
            wanted = torch.where(on > 0, (T * scale).clamp(t_min, t_max), 1.0)
            logits.mul_(divisor(T) / divisor(wanted))
            T = wanted
        return logits, T

    def cut(
        self,
        logits: torch.Tensor,
        picked: Picked,
        slots: np.ndarray,
        rows: torch.Tensor,
        *,
        over_temperature: bool = False,
    ) -> torch.Tensor:
        """Logits with −inf outside the kept sets, in place.

        Args:
            logits: `[R, V]` fp32, of `scale`.
            picked: as there, and so are `slots` and `rows`.
            over_temperature: whether they are over the requests' own temperatures already.
        """
        *_, cut, temperature, min_p = self._on_device[rows].unbind(1)
        if self.cuts_top_p and self.draws[slots].any():
            draws = temperature > 0
            divide = draws & (not over_temperature)
            top_p = torch.where(draws, picked.top_p, 1.0)
            logits = cut_top_p_(logits, top_p, torch.where(divide, temperature, 1.0))
        if self.cuts[slots].any():
            level = min_p.log() if over_temperature else cut
            logits.masked_fill_(below_min_p(logits, level[:, None]), -math.inf)
        return logits
