"""One training step of a head: forward, statistics, losses, backward.

Sums over micro-batches and processes, then a mean.

A term's gradient is divided by the weight of the whole step's tokens in the term, once, at the end.
So neither accumulation nor the number of processes changes what is computed. The base model's
activations are not kept: its hidden states come in without a graph, and the statistics' gradients
are closed forms of row moments.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from autodeco_fast import TokenStats
from autodeco_fast.training.objectives import Batch, Objective, Sums


@dataclass
class Term:
    """A loss summed over tokens, `[]` each, and its gradient with respect to every parameter."""

    loss: torch.Tensor
    weight: torch.Tensor  # of these tokens, together
    gradients: list[torch.Tensor]

    def __add__(self, other: "Term") -> "Term":
        gradients = [a + b for a, b in zip(self.gradients, other.gradients)]
        return Term(self.loss + other.loss, self.weight + other.weight, gradients)

    def mean(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens, a token; 0 where there is none."""
        return sums / torch.where(self.weight > 0, self.weight, 1.0)


@dataclass
class Step:
    """The terms of a step so far; `+` adds micro-batches."""

    terms: dict[str, Term]

    @staticmethod
    def zero(names: Iterable[str], parameters: list[nn.Parameter]) -> "Step":
        """A step without tokens."""
        none = torch.zeros((), device=parameters[0].device)
        return Step(
            {name: Term(none, none, [torch.zeros_like(p) for p in parameters]) for name in names}
        )

    def __add__(self, other: "Step") -> "Step":
        return Step({name: term + other.terms[name] for name, term in self.terms.items()})

    def scaled(self, factors: dict[str, float]) -> "Step":
        """The same terms, each times its factor."""
        return Step(
            {
                n: Term(f * t.loss, t.weight, [f * g for g in t.gradients])
                for n, f in factors.items()
                for t in (self.terms[n],)
            }
        )

    def reduce(self, add: Callable[[torch.Tensor], torch.Tensor]) -> "Step":
        """Sums over processes: `add` takes a tensor and returns its sum over all of them."""
        return Step(
            {
                n: Term(add(t.loss), add(t.weight), [add(g) for g in t.gradients])
                for n, t in self.terms.items()
            }
        )

    def assign(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sets `.grad` to the gradient of the sum of the terms' means."""
        scaled = [[t.mean(g) for g in t.gradients] for t in self.terms.values()]
        for parameter, gradients in zip(parameters, zip(*scaled)):
            parameter.grad = torch.stack(gradients).sum(0).to(parameter.dtype)

    def means(self) -> dict[str, float]:
        """Each term's mean; 0 where it has no tokens."""
        return {name: t.mean(t.loss).item() for name, t in self.terms.items()}


@dataclass
class Seen:
    """What was predicted for the tokens of a batch, for metrics and diagnostics; `[N]` each."""

    temperature: torch.Tensor
    stats: TokenStats
    weight: torch.Tensor  # 0: not learned from

    @property
    def selected(self) -> torch.Tensor:
        return self.weight > 0


def trained(head: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in head.parameters() if p.requires_grad]


def differentiate(sums: Sums, parameters: list[nn.Parameter]) -> tuple[Step, Seen]:
    """Backward of every term."""
    terms = {}
    for i, (name, (loss, weight)) in enumerate(sums.terms.items()):
        if loss.requires_grad:
            found = torch.autograd.grad(
                loss, parameters, retain_graph=i + 1 < len(sums.terms), allow_unused=True
            )
        else:
            found = [None] * len(parameters)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
        terms[name] = Term(loss.detach(), weight, gradients)
    stats = TokenStats(*(None if field is None else field.detach() for field in sums.stats))
    return Step(terms), Seen(sums.temperature, stats, sums.weight)


def training_step(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    lm_head: nn.Module,
    head: nn.Module,
    objective: Objective,
    uniform: torch.Tensor | None = None,
) -> tuple[Step, Seen]:
    """Forward and backward of a head on some tokens.

    `step.assign(trained(head))` makes the gradient that an optimizer takes.

    Args:
        hidden: `[N, H]` what enters the output embedding; no gradient goes there.
        targets: `[N]` int64 ids, −100 where there is none.
        lm_head: an `nn.Linear`, or a `BaseModel`, which also knows scale and softcap.
        head: a `TemperatureHead`, or what else the objective takes.
        objective: one of `training/objectives.py`.
        uniform: `[N]` in [0, 1), what it leaves out at random; drawn with torch if None.

    Returns:
        The step, to be added to others, and what it saw.
    """
    batch = Batch(hidden.detach(), targets, uniform)
    return differentiate(objective(batch, lm_head, head), trained(head))
