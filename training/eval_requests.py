"""What is asked of a model or a server, and what comes back."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from autodeco_fast.policies import Policy


@dataclass(frozen=True)
class Request:
    """A sample to draw."""

    prompt: int  # its number, from 0
    sample: int  # of that prompt
    seed: int  # of its noise


@dataclass(frozen=True)
class Drawn:
    """A sample that was drawn; its tokens end with the one that ended it."""

    text: str
    tokens: list[int] | None  # None where a server does not say
    temperature: list[float] | None  # of each
    kept: list[int] | None  # kept-set size at each
    truncated: bool  # neither an end-of-sequence token nor a stop string
    length: int  # in tokens
    top_p: list[float] | None = None  # of each token, where the policy predicts it


Draw = Callable[[Sequence[Request]], list[Drawn]]


class Source(Protocol):
    """What samples are drawn from."""

    def length(self, prompt: int) -> int:
        """Of a prompt: those of similar length are drawn together."""

    def check(self, policy: Policy) -> None:
        """Raises ValueError for a policy that cannot be drawn under."""

    def under(self, policy: Policy) -> AbstractContextManager[Draw]:
        """Gives what draws a batch of samples under a policy."""


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """The seed of a sample, in [0, 2⁶³): the same under every policy and in any batch."""
    digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batches(source: Source, *, prompts: int, samples: int, size: int, seed: int) -> list:
    """All samples of all prompts in batches of `size` requests, shorter prompts first."""
    order = sorted(range(prompts), key=source.length)
    requests = [Request(p, s, seed_of(seed, p, s)) for p in order for s in range(samples)]
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)] if found else text
