"""What drawing from a model takes beside `generate`: where completions end, no settings of the
model's own, prompts that are read once however many completions they get, and rows that leave the
batch when they have ended."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from autodeco_fast.training.base_model import end_ids
from autodeco_fast.training.eval_requests import cut_at_stop
from autodeco_fast.training.scan_store import fingerprint
from autodeco_fast.training.shading import BROKEN

_LEAD_IN = 8  # ids of a prompt at most


class LeadIn(NamedTuple):
    """The end of a prompt, behind which its completions are decoded."""

    ids: Sequence[int] = ()
    text: str = ""


_NOTHING = LeadIn()


class StopStrings:
    """Finds stop strings in what is generated.

    One can only be complete after a token that holds its last character, so other rows are not
    decoded.
    """

    def __init__(self, tokenizer, stop: Sequence[str], vocabulary: int, device: torch.device):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        last = {s[-1] for s in stop}
        texts = tokenizer.batch_decode([[i] for i in range(vocabulary)]) if stop else []
        # Decoded alone, a token may lose the space it begins with.
        any_token = " " in last
        self._may_end = torch.tensor(
            [any_token or BROKEN in text or not last.isdisjoint(text) for text in texts],
            dtype=torch.bool,
            device=device,
        )

    def found(
        self, new_ids: torch.Tensor, ended: torch.Tensor, leads: Sequence[LeadIn]
    ) -> torch.Tensor:
        """Which rows of new ids `[B, n]`, each behind its prompt's end, hold a stop string, of
        those that have not ended. [B]"""
        out = torch.zeros_like(ended)
        if not self.stop:
            return out
        for row in (self._may_end[new_ids[:, -1]] & ~ended).nonzero().flatten().tolist():
            text = decode(self.tokenizer, new_ids[row].tolist(), leads[row])
            out[row] = any(s in text for s in self.stop)
        return out


def ends_of(model, tokenizer, stop: Sequence[str]) -> list[int]:
    """The ids after which a text of the model ends, and those of stop strings that are special
    tokens, which no decoded text holds."""
    vocabulary = tokenizer.get_vocab() if stop else {}
    own, found = end_ids(model, tokenizer), [vocabulary[s] for s in stop if s in vocabulary]
    return own + [i for i in found if tokenizer.decode([i]) and not decode(tokenizer, [i])]


def known_by(prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> dict[str, object]:
    """What completions of encoded prompts depend on beside the model: a changed chat template or
    generation configuration shows in it."""
    return {"prompt_ids": fingerprint(json.dumps(prompts).encode()), "ends": sorted(set(ends))}


def lead_in(tokenizer, content: str | list[dict], ids: list[int]) -> LeadIn:
    """The last ids of a text prompt that make whole characters: decoded alone, a completion may
    lose the space it begins with, and prompt + completion would be another text.

    None of a chat: what stands between a template and an answer is no part of the answer.
    """
    if isinstance(content, str):
        for n in range(1, min(len(ids), _LEAD_IN) + 1):
            text = decode(tokenizer, ids[-n:])
            if text and BROKEN not in text:
                return LeadIn(ids[-n:], text)
    return _NOTHING


def decode(tokenizer, ids: Sequence[int], lead: LeadIn = _NOTHING) -> str:
    """Text without special tokens, spaces as they are: what ids add to the text before them."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode([*lead.ids, *ids], **how)
    if not text.startswith(lead.text):
        return tokenizer.decode(list(ids), **how)
    return text[len(lead.text) :]


def completion_text(
    tokenizer, ids: list[int], *, lead: LeadIn, ends: Collection[int], stop: Sequence[str]
) -> str:
    """A completion as scorers and reward functions get it: without what ended it, be that an id or
    a stop string."""
    ids = ids[:-1] if ids and ids[-1] in ends else ids
    return cut_at_stop(decode(tokenizer, ids, lead), stop)


class Ends(StoppingCriteria):
    """Notes which rows have ended, and after how many tokens of this call."""

    def __init__(
        self,
        strings: StopStrings,
        eos: torch.Tensor,
        *,
        start: int,
        leads: Sequence[LeadIn],
        early: bool = False,
    ):
        """
        Args:
            eos: ids that end a completion.
            start: length of the padded prompts.
            leads: `[rows]`, the prompts' ends.
            early: whether to stop once half of the rows have ended.
        """
        self.early, self.leads, rows = early, leads, len(leads)
        self.strings, self.eos, self.start = strings, eos, start
        self.ended = torch.zeros(rows, dtype=torch.bool, device=eos.device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=eos.device)

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        new = input_ids[:, self.start :]
        self.length += ~self.ended
        ending = torch.isin(new[:, -1], self.eos) | self.strings.found(new, self.ended, self.leads)
        self.ended |= ending
        return self.ended | (2 * self.ended.sum() >= len(new)) if self.early else self.ended


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """The model without generation settings of its own: a repetition penalty, say, would change
    what is drawn, and what is known of the tokens would not be of it. Ends go, too."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def prefilled(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, copies: torch.Tensor
) -> DynamicCache | None:
    """The keys and values of left-padded prompts, each read once, for a call of `generate` with
    copies of them. None if the model keeps something else.

    Args:
        ids, mask: `[P, W]`. The last column is left to `generate`, which makes the first logits
            from it.
        copies: `[rows]`, which prompt a row continues.
    """
    ids, mask = ids[:, :-1], mask[:, :-1]
    cache = DynamicCache(config=model.config)
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if any(type(layer) not in kinds for layer in cache.layers):
        return None
    if ids.shape[1]:
        model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(copies.to(ids.device))
    return cache


class Stretch(NamedTuple):
    """What one call of `generate` drew."""

    rows: torch.Tensor  # [n], which of all rows
    new: torch.Tensor  # [n, steps] ids; those behind a row's end count for nothing
    ends: Ends


def stretches(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    cache: DynamicCache | None,
    strings: StopStrings,
    leads: Sequence[LeadIn],
    eos: torch.Tensor,
    max_new_tokens: int,
    of_rows: dict[str, torch.Tensor],
    **options: object,
) -> Iterator[Stretch]:
    """Completions, by calls of `generate` each of which ends when half of its rows have; the others
    go on in the next. All in one call where there is no cache to go on from.

    Args:
        ids, mask: `[rows, W]`, left-padded prompts.
        cache: of what `prefilled` gives, for all rows.
        leads: `[rows]`, the prompts' ends.
        of_rows: options of `generate` that have a value a row.
        options: others.
    """
    start, rows = ids.shape[1], torch.arange(len(ids), device=ids.device)
    if cache is not None:
        options["past_key_values"] = cache
    while len(rows):
        length = ids.shape[1]
        going_on = [leads[row] for row in rows.tolist()]
        ends = Ends(strings, eos, start=start, leads=going_on, early=cache is not None)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens - (length - start),
            stopping_criteria=StoppingCriteriaList([ends]),
            eos_token_id=eos.tolist() or None,
            **{name: values[rows.to(values.device)] for name, values in of_rows.items()},
            **options,
        )
        yield Stretch(rows, out[:, length:], ends)
        if out.shape[1] - start == max_new_tokens or ends.ended.all():
            return
        going = (~ends.ended).nonzero()[:, 0]
        rows, ids = rows[going], out[going]
        mask = torch.cat([mask[going], mask.new_ones(len(going), out.shape[1] - length)], 1)
        cache.batch_select_indices(going)
