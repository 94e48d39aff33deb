"""A user's reward function, called as TRL calls one, and what it returns checked."""

import math
import numbers
from collections.abc import Callable

from autodeco_fast.errors import foreign

Completion = str | list[dict]  # a chat's is one message of the assistant


def rewards_of(
    function: Callable,
    spec: str,
    prompts: list[Completion],
    completions: list[Completion],
    columns: dict[str, list],
) -> list[float]:
    """What the function says of completions, a finite number each.

    Raises:
        ValueError: if it raises, or returns anything else.
    """
    with foreign(f"reward {spec!r} failed"):
        returned = function(prompts=prompts, completions=completions, **columns)
        scores = list(returned)
    if len(scores) != len(completions):
        raise ValueError(
            f"reward {spec!r} must return a number for each of {len(completions)} completions, got "
            f"{len(scores)}"
        )
    for i, score in enumerate(scores):
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise ValueError(
                f"reward {spec!r} must return finite numbers, got {score!r} for completion {i}"
            )
    return [float(score) for score in scores]
