"""Inside transformers' decoding loop: the fused sampler, and other people's callbacks.

Processors, stopping criteria and streamers may call the model themselves, or its `generate`. While
they run the gate is paused, so they find the model as it is.
"""

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkLogitsProcessor,
)
from transformers.generation.logits_process import LogitNormalization
from transformers.generation.streamers import BaseStreamer

from autodeco_fast.generation.gate import Call, Gate
from autodeco_fast.generation.lazy import LazyLogits, OneHot
from autodeco_fast.ops.checks import check_integer, check_seed
from autodeco_fast.ops.linear_sample import linear_sample
from autodeco_fast.ops.sample import COUNTER, SampleOutput
from autodeco_fast.policies.masking import masked

# What transformers puts after every cut.
_LAST = (WatermarkLogitsProcessor, SynthIDTextWatermarkLogitsProcessor, LogitNormalization)
_BROKEN = {
    1: "NaN",
    2: "inf",
    4: "no finite logit: everything is masked",
    8: "a temperature or min_p out of range",
}


class _PausedProcessors(LogitsProcessorList):
    gate: Gate

    def __call__(self, *args, **kwargs):
        with self.gate.paused():
            return super().__call__(*args, **kwargs)


class _PausedCriteria(StoppingCriteriaList):
    gate: Gate

    def __call__(self, *args, **kwargs):
        with self.gate.paused():
            return super().__call__(*args, **kwargs)


class _PausedStreamer(BaseStreamer):
    def __init__(self, streamer: BaseStreamer, gate: Gate):
        self.streamer, self.gate = streamer, gate

    def put(self, value):
        with self.gate.paused():
            self.streamer.put(value)

    def end(self):
        with self.gate.paused():
            self.streamer.end()


def paused(
    gate: Gate, processors, criteria, streamer
) -> tuple[LogitsProcessorList, StoppingCriteriaList, BaseStreamer | None]:
    """The same callbacks, the gate paused while they run."""
    processors, criteria = _PausedProcessors(processors), _PausedCriteria(criteria)
    processors.gate = criteria.gate = gate
    return processors, criteria, None if streamer is None else _PausedStreamer(streamer, gate)


def _first_position(
    input_ids: torch.Tensor, config: GenerationConfig, kwargs: dict
) -> int | torch.Tensor:
    """The real tokens of each prompt, ids or embeddings: noise does not depend on left padding."""
    mask, embeddings = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if mask is not None and mask.dim() == 2:
        return (mask.to(input_ids.device) != 0).sum(1)
    # Transformers drops a mask that masks nothing, and notes its length here.
    length = getattr(config, "_mask_length", None)
    if length is None:
        length = input_ids.shape[1] if embeddings is None else embeddings.shape[1]
    return length


def _integers(name: str, value, check) -> int | torch.Tensor:
    """An integer, or a tensor of several, from whatever holds them; checked unless on a GPU."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu" and value.dim():
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {value.dtype}")
        return value.long()
    value = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value
    if isinstance(value, (list, tuple)):
        return torch.tensor([check(name, item) for item in value], dtype=torch.int64)
    return check(name, value)


def seeds(seed) -> int | torch.Tensor:
    """The seed of a call: one, or one a prompt."""
    return _integers("seed", seed, lambda _, item: check_seed(item))


def streams(stream) -> int | torch.Tensor:
    """The stream of a call: one, or one a row."""
    return _integers("stream", stream, lambda name, item: check_integer(name, item, COUNTER))


def _one_each(name: str, value: torch.Tensor, number: int, of: str) -> torch.Tensor:
    """The value, if it has one number for each of so many prompts or rows."""
    if value.shape != (number,):
        expected = f"an integer or a list of {number}, one a {of}"
        shared = ", which its returned sequences share" if of == "prompt" else ""
        raise ValueError(f"{name} must be {expected}{shared}; got shape {tuple(value.shape)}")
    return value


def _noise(call: Call, rows: int, per_prompt: int, device: torch.device) -> dict:
    """Seed and stream as `sample` takes them: numbers, or one a row.

    Under one seed the stream is the row. Under a seed a prompt it is the sequence's number among
    those of its prompt, so that a prompt's text does not depend on what it is batched with.
    """
    seed, stream = call.seed, call.stream
    if isinstance(seed, torch.Tensor):
        seed = _one_each("seed", seed, rows // per_prompt, of="prompt").to(device)
        seed = seed.repeat_interleave(per_prompt)
        if stream is None:
            stream = torch.arange(per_prompt, device=device).repeat(rows // per_prompt)
    if isinstance(stream, torch.Tensor):
        stream = _one_each("stream", stream, rows, of="row").to(device)
    return {"seed": seed, "stream": stream}


class FusedSampler(LogitsProcessor):
    """Last in the list: samples the token and returns scores whose argmax it is, taken next."""

    def __init__(self, call: Call, input_ids: torch.Tensor, config: GenerationConfig, kwargs: dict):
        self.call, self.length = call, input_ids.shape[1]
        self.policy = call.policy.started()
        self.start = _first_position(input_ids, config, kwargs)
        per_prompt = config.num_return_sequences or 1
        self.noise = _noise(call, len(input_ids), per_prompt, input_ids.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        call, position = self.call, self.start + (input_ids.shape[1] - self.length)
        options = {**self.noise, "position": position, "return_kept": call.recorded}
        try:
            out = self._sample(scores, **options)
        except ValueError as error:  # seed and stream are checked: it is the temperature
            raise RuntimeError(f"a row cannot be sampled from: {error}") from None
        self.policy.drawn(out.token)
        call.status = out.status if call.status is None else call.status | out.status
        if call.recorded:
            call.note(out.kept)
        return OneHot(out.token, scores.shape[1])

    def _sample(self, scores: torch.Tensor, **options) -> SampleOutput:
        if self.call.policy.cuts_by_row:
            cut = self.policy.cut(scores).at(self.call.top_p)
            return cut.sample(scores, greedy=self.call.greedy, **options)
        cut = self.policy.cut(None)
        if isinstance(scores, LazyLogits) and scores.untouched:
            weight, bias = scores.embedding.weight, scores.embedding.bias
            cuts = {"min_p": cut.min_p, "top_k": cut.top_k, "top_p": cut.top_p}
            return linear_sample(
                scores.hidden, weight, scores.temperature, bias=bias, **cuts, **options
            )
        # At temperature 1, scaled logits are the logits at T, and so is their cut.
        return cut.sample(scores, greedy=self.call.greedy, **options)


class Masking(LogitsProcessor):
    """For other sampling steps than ours: −inf outside a cut that differs from row to row."""

    def __init__(self, call: Call):
        self.call = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.call.masked:
            return scores
        return masked(scores, self.call.policy.cut(scores).at(self.call.top_p))


class Recording(LogitsProcessor):
    """For other sampling steps than ours, last in the list: notes T and the kept set's size."""

    def __init__(self, call: Call):
        self.call = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.call.note((scores > -torch.inf).sum(1))
        return scores


def unfused(call: Call, processors: list) -> list:
    """The processors of a call that is sampled by transformers: with the policy's cut, before a
    watermark and after all others, and with the records that are asked for."""
    processors = list(processors)
    if call.policy.cuts_by_row:
        at = next((i for i, each in enumerate(processors) if isinstance(each, _LAST)), None)
        processors.insert(len(processors) if at is None else at, Masking(call))
    return [*processors, Recording(call)] if call.recorded else processors


def check_status(call: Call) -> None:
    """Looks, once, at what the sampler reported in a finished call.

    Raises:
        RuntimeError: if a row had nothing to sample from, as `torch.multinomial` would have raised.
    """
    broken = [] if call.status is None else call.status.tolist()
    for row, status in enumerate(broken):
        if status:
            why = " and ".join(text for bit, text in _BROKEN.items() if status & bit)
            raise RuntimeError(f"row {row} cannot be sampled from: its logits over T held {why}")
