"""What a sampler is asked and what it answers: the words that ops and both backends share."""

from typing import NamedTuple

import torch

# What is wanted beside token and status: a sum of these.
LOGPROB, KEPT, FULL_LOGPROB, CANDIDATE = 1, 2, 4, 8
SUBTILE = 256  # neighbouring logits that share a maximum


class SampleOutput(NamedTuple):
    """What `sample` returns, one entry a row; None for what was not asked for."""

    token: torch.Tensor  # [B] int64
    # [B] fp32, nats: of the token under the distribution drawn from, cut and renormalised;
    # 0 if greedy
    logprob: torch.Tensor | None
    # [B] int32: tokens inside all cuts; 1 if greedy, 0 if nothing is finite or allowed, or where
    # the status has 8
    kept: torch.Tensor | None
    # [B] int32: 0, or the sum of 1 (NaN seen), 2 (+inf seen), 4 (nothing finite or allowed:
    # token 0) and 8 (temperature, min_p, top_k or top_p is NaN or out of range, where the host does
    # not look: token 0)
    status: torch.Tensor
    full_logprob: torch.Tensor | None = None  # [B] fp32, nats: the same as logprob, uncut


class Sampled(NamedTuple):
    """What a backend returns, one entry a row; None for what was not wanted."""

    token: torch.Tensor  # fields as in `SampleOutput`
    status: torch.Tensor
    logprob: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    full_logprob: torch.Tensor | None = None
    # [3, B] fp32: the row's maximum, and score z + T·g and logit of its token, −inf without one
    candidate: torch.Tensor | None = None


class SamplingParameters(NamedTuple):
    """How B rows are sampled: each field a number that all rows share, or a contiguous `[B]` tensor
    on the device of the logits, fp32 or int64."""

    temperature: torch.Tensor | float
    min_p: torch.Tensor | float = 0.0  # 0 cuts nothing, as the next
    top_k: torch.Tensor | int = 0
    top_p: torch.Tensor | float = 1.0  # 1 cuts nothing
    seed: torch.Tensor | int = 0
    position: torch.Tensor | int = 0
    stream: torch.Tensor | int | None = 0  # None: the row index

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p may cut."""
        by_row = isinstance(self.top_k, torch.Tensor) or isinstance(self.top_p, torch.Tensor)
        return by_row or self.top_k > 0 or self.top_p < 1

    def of_rows(self, rows: torch.Tensor | slice) -> "SamplingParameters":
        """Those of some rows; the stream must not be None."""
        return SamplingParameters(*(x[rows] if isinstance(x, torch.Tensor) else x for x in self))

    def packed(self) -> tuple[list[torch.Tensor | None], list[float], list[int]]:
        """As an op's schema takes them: tensors, None where a number serves; the numbers."""
        tensors, numbers = tensors_and_numbers(*self)
        temperature, min_p, top_k, top_p, seed, position, stream = numbers
        floats = [float(temperature), float(min_p), float(top_p)]
        return tensors, floats, [top_k, seed, position, -1 if stream is None else stream]

    @classmethod
    def unpacked(
        cls, tensors: list[torch.Tensor | None], floats: list[float], integers: list[int]
    ) -> "SamplingParameters":
        """The inverse of `packed`."""
        (temperature, min_p, top_p), (top_k, seed, position, stream) = floats, integers
        stream = None if stream == -1 else stream
        numbers = temperature, min_p, top_k, top_p, seed, position, stream
        return cls(*(number if x is None else x for number, x in zip(numbers, tensors)))


def tensors_and_numbers(*values: torch.Tensor | float) -> tuple[list, list]:
    """Parameters as backends take them: tensors, None for numbers; and numbers, 0 for tensors."""
    tensors = [x if isinstance(x, torch.Tensor) else None for x in values]
    return tensors, [0 if isinstance(x, torch.Tensor) else x for x in values]


def stream_and_step(stream: torch.Tensor | int | None) -> tuple[torch.Tensor | int, int]:
    """`stream` and `stream_step` of `stream + row·stream_step`: None is the row index."""
    return (0, 1) if stream is None else (stream, 0)
