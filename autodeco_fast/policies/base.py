"""What a policy is asked: T where the logits leave the model, a cut where a token is drawn.

A temperature divides the logits before anybody else sees them, so it is made of the hidden state
and of the model's own logits; a top-p that is predicted is made of the same. A cut is made of what
is left to draw from: the logits over T, after every other processor. Any cut is a lowest logit; as
Min-P of the logits over T, `z ≥ max z − c` is `min_p = e^{−c}`.
"""

import inspect
from dataclasses import Field, dataclass, fields
from typing import ClassVar, NamedTuple

import torch

from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.ops.sample import sample
from autodeco_fast.options import Options, documented, option
from autodeco_fast.policies.temperature import divisor
from autodeco_fast.sampling import SampleOutput
from autodeco_fast.values import require

SHORT = {"temperature": "T"}  # how options are written in text


class Picked(NamedTuple):
    """What a policy picks of each row where its logits leave the model, `[...]` fp32 each."""

    temperature: torch.Tensor
    top_p: torch.Tensor | None = None  # in (0, 1], where it is predicted

    @property
    def greedy(self) -> torch.Tensor:
        """`[...]` bool: rows whose largest logit is taken."""
        return self.temperature < GREEDY_BELOW

    def to(self, device: torch.device) -> "Picked":
        """On a device."""
        return Picked(*(each if each is None else each.to(device) for each in self))


class Cut(NamedTuple):
    """Which tokens may be drawn, in the words of `sample` at temperature 1; a number or `[B]`
    each."""

    min_p: torch.Tensor | float = 0.0
    top_k: torch.Tensor | int | None = None
    top_p: torch.Tensor | float | None = None
    logits: torch.Tensor | None = None  # [B, V]: drawn from in place of the logits over T

    def at(self, top_p: torch.Tensor | None) -> "Cut":
        """With the top-p that was picked of each row; itself where none was."""
        return self if top_p is None else self._replace(top_p=top_p)

    def sample(
        self, scaled: torch.Tensor, *, greedy: torch.Tensor | None = None, **options
    ) -> SampleOutput:
        """Draws from logits over T, `[B, V]`.

        Args:
            greedy: `[B]` bool, rows whose T is greedy: the lowest of their largest tokens.
            options: seed, position and what else `sample` takes.
        """
        logits = scaled if self.logits is None else self.logits
        T = 1.0 if greedy is None else (~greedy).float()
        return sample(logits, T, min_p=self.min_p, top_k=self.top_k, top_p=self.top_p, **options)


@documented
@dataclass(frozen=True, kw_only=True)
class Policy(Options):
    """Picks T and the cut of every token. A subclass overrides `rule`, `cut` or both.

    `T = clip(scale · rule(h, z), t_min, t_max)`; T < 1e-3 is greedy.
    """

    kind: ClassVar[str]  # its name in text
    reads_logits: ClassVar[bool] = False  # whether `rule` does
    cuts_by_row: ClassVar[bool] = False  # whether the cut is one of its own a row; else numbers
    remembers: ClassVar[bool] = False  # whether it must be told what was drawn

    min_p: float = option("Min-P cut at T; 0 cuts nothing", 0.0, must_be="in [0, 1]")
    scale: float = option("factor on T", 1.0, must_be="positive")
    t_min: float = option("lowest T, after the factor", 0.0, must_be="≥ 0")
    t_max: float | None = option("highest T, likewise", None, must_be="≥ 0")

    def __post_init__(self):
        super().__post_init__()
        highest = self.t_max
        require(highest is None or highest >= self.t_min, "t_max", highest, f"≥ t_min {self.t_min}")

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor | float:
        """T before factor and range, `[...]` or one number.

        Args:
            hidden: `[..., H]`, what enters the output embedding.
            logits: `[..., V]`, as the model makes them; None unless `reads_logits`.
        """
        return 1.0

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        """The cut of logits over T, `[B, V]` fp32; they are None unless `cuts_by_row`."""
        return Cut(min_p=self.min_p)

    def temperatures(
        self, hidden: torch.Tensor, logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """T of every row, `[...]` fp32; arguments as of `rule`."""
        return self._in_range(self._ruled(hidden, logits))

    def pick(self, hidden: torch.Tensor, logits: torch.Tensor | None = None) -> Picked:
        """T of every row, and top-p if it is predicted; arguments as of `rule`."""
        return Picked(self.temperatures(hidden, logits))

    def _ruled(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """What `rule` says, `[...]` fp32."""
        T = self.rule(hidden, logits)
        if not isinstance(T, torch.Tensor):
            T = torch.full(hidden.shape[:-1], T, dtype=torch.float32, device=hidden.device)
        return T.float()

    def _in_range(self, T: torch.Tensor) -> torch.Tensor:
        """With the factor, inside the range."""
        if self.scale != 1.0:
            T = T * self.scale
        if self.t_min > 0 or self.t_max is not None:
            T = T.clamp(self.t_min, self.t_max)
        return T

    def sample(self, hidden: torch.Tensor, logits: torch.Tensor, **options) -> SampleOutput:
        """Draws a token a row by hand, as an attached model does.

        Args:
            hidden: `[B, H]`.
            logits: `[B, V]`.
            options: seed, position and what else `sample` takes beside the temperature and cuts.
        """
        picked = self.pick(hidden, logits)
        scaled = logits.float() / divisor(picked.temperature)
        cut = self.cut(scaled if self.cuts_by_row else None).at(picked.top_p)
        return cut.sample(scaled, greedy=picked.greedy, **options)

    def times(self, factor: float) -> "Policy":
        """Itself as it cuts where a call of `generate` multiplies T by a factor."""
        return self

    def started(self) -> "Policy":
        """What decides one call of `generate`: itself, unless it remembers."""
        return self

    def drawn(self, token: torch.Tensor) -> None:
        """Told the tokens `[B]` that were drawn under the last cut."""

    def to(self, device: torch.device) -> "Policy":
        """Itself, what it holds moved to a device."""
        return self

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states it reads; None if it reads none."""
        return None

    @property
    def trained_min_p(self) -> float | None:
        """The Min-P cut it was trained or calibrated for; None if for none."""
        return None

    def _words(self) -> list[str]:
        """Its name, T, the options that are its own, and what else is not the default."""
        own = {"temperature", *inspect.get_annotations(type(self))}
        shown = [
            f"{SHORT.get(each.name, each.name)}={_number(getattr(self, each.name))}"
            for each in ordered(type(self))
            if getattr(self, each.name) != (None if each.name in own else each.default)
        ]
        return [self.kind, *shown]

    def __str__(self) -> str:
        """The text that `parse` makes it of."""
        return " ".join(self._words())

    @property
    def name(self) -> str:
        return str(self)


@dataclass(frozen=True, kw_only=True)
class FixedCut(Policy):
    """A policy whose cut is a choice of numbers."""

    top_k: int | None = option("top-k cut; None cuts nothing", None, must_be="at least 1")
    top_p: float | None = option("top-p cut at T; None cuts nothing", None, must_be="in (0, 1]")

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        return Cut(min_p=self.min_p, top_k=self.top_k, top_p=self.top_p)


def ordered(policy: type[Policy]) -> list[Field]:
    """The options of a policy as they are written: T, those of its kind, those of all."""
    of_all = inspect.get_annotations(Policy)
    return sorted(fields(policy), key=lambda each: (each.name in of_all, each.name not in SHORT))


def _number(value: object) -> str:
    """A number as short as it can be read back; anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)
