"""Samples of a model on this machine, many prompts and samples at a time.

Prompts are left-padded. A prompt that several rows of a batch share is read once and its cache
repeated. Once half of a batch's rows have ended the others go on without them. Noise depends on
(seed, position) alone, so neither changes a sample, up to the rounding of matrix products.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, StoppingCriteriaList

from autodeco_fast import Attachment, attach
from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.policies import Policy
from autodeco_fast.training.base_model import end_ids, left_padded, positions, wrap
from autodeco_fast.training.drawing import Ends, StopStrings, completion_text, prefilled
from autodeco_fast.training.eval_requests import Draw, Drawn, Request
from autodeco_fast.training.head_folder import check_model, training_settings
from autodeco_fast.training.prompts import Prompt, encode_prompt
from autodeco_fast.training.scan import lm_head_fingerprint


class LocalModel:
    """Draws from a causal language model of transformers."""

    def __init__(
        self, model, tokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int, stop=()
    ):
        """
        Raises:
            ValueError: naming the line of a prompt that the model or tokenizer cannot take.
        """
        self.model, self.tokenizer, self.max_new_tokens = model.eval(), tokenizer, max_new_tokens
        limits = {
            "vocabulary": model.get_input_embeddings().weight.shape[0],
            "positions": positions(model.config),
            "new_tokens": max_new_tokens,
        }
        self.ids = [encode_prompt(tokenizer, prompt, **limits) for prompt in prompts]
        device = model.device
        self.eos = torch.tensor(end_ids(model, tokenizer), device=device).long()
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.strings = StopStrings(tokenizer, stop, vocabulary, device)
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else next(iter(self.eos.tolist()), 0)

    def length(self, prompt: int) -> int:
        """Of a prompt, in tokens: those of similar length are drawn together."""
        return len(self.ids[prompt])

    def check(self, policy: Policy) -> None:
        """Raises ValueError for a head of another width, or trained for another model."""
        width = self.model.get_output_embeddings().weight.shape[1]
        if policy.hidden_size not in (None, width):
            raise ValueError(
                f"policy '{policy}' reads hidden states of width {policy.hidden_size}, the model's "
                f"have {width}"
            )
        folder = getattr(policy, "folder", None)
        if folder is not None and training_settings(Path(folder)):
            check_model(Path(folder), lm_head_fingerprint(wrap(self.model)))

    @contextmanager
    def under(self, policy: Policy) -> Iterator[Draw]:
        """Yields what draws a batch of samples under a policy."""
        with attach(self.model, policy, record=True) as attachment:
            self._warm_up()
            yield lambda requests: self._draw(attachment, policy, requests)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compiles what is compiled on first use, which is no speed of the policy."""
        ids, mask = left_padded([[self.pad, self.pad]] * 2, self.pad, self.model.device)
        self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=2,
            seed=torch.tensor([0, 1]),
            pad_token_id=self.pad,
        )

    @torch.inference_mode()
    def _draw(
        self, attachment: Attachment, policy: Policy, requests: Sequence[Request]
    ) -> list[Drawn]:
        batch = _Batch(self, requests)
        if not policy.remembers:  # a memory would not survive the thinning
            batch.prefill()
        while batch.rows:
            batch.step(attachment)
        return [self._drawn(row) for row in batch.drawn]

    def _drawn(self, row: "_Row") -> Drawn:
        ends, stop = self.eos.tolist(), self.strings.stop
        return Drawn(
            text=completion_text(self.tokenizer, row.tokens, ends=ends, stop=stop),
            tokens=row.tokens,
            temperature=row.temperature,
            kept=row.kept,
            top_p=row.top_p,
            truncated=not row.ended,
            length=len(row.tokens),
        )


@dataclass
class _Row:
    """What has been drawn of a request."""

    tokens: list[int]
    temperature: list[float]
    kept: list[int]
    top_p: list[float] | None = None  # of a policy that predicts it
    ended: bool = False


class _Batch:
    """Requests that are drawn together; the rows of those that have ended are left out."""

    def __init__(self, of: LocalModel, requests: Sequence[Request]):
        self.of, self.requests = of, requests
        prompts = [of.ids[request.prompt] for request in requests]
        self.ids, self.mask = left_padded(prompts, of.pad, of.model.device)
        self.seeds = torch.tensor([request.seed for request in requests])
        self.start = self.ids.shape[1]
        self.drawn = [_Row([], [], []) for _ in requests]
        self.rows = list(range(len(requests)))  # which request a row of `ids` is
        self.cache: DynamicCache | None = None

    def prefill(self) -> None:
        """Reads each prompt once, if the model's cache can be repeated and thinned."""
        numbers = [request.prompt for request in self.requests]
        first = list(dict.fromkeys(numbers))
        once = [numbers.index(number) for number in first]
        copies = torch.tensor([first.index(number) for number in numbers])
        self.cache = prefilled(self.of.model, self.ids[once], self.mask[once], copies)

    def step(self, attachment: Attachment) -> None:
        """Draws until half of the rows have ended, or all where there is no cache to go on from."""
        of, length = self.of, self.ids.shape[1]
        ends = Ends(
            of.strings,
            of.eos,
            start=self.start,
            rows=len(self.rows),
            early=self.cache is not None,
        )
        cached = {} if self.cache is None else {"past_key_values": self.cache}
        out = of.model.generate(
            input_ids=self.ids,
            attention_mask=self.mask,
            max_new_tokens=of.max_new_tokens - (length - self.start),
            seed=self.seeds[self.rows],
            stopping_criteria=StoppingCriteriaList([ends]),
            pad_token_id=of.pad,
            eos_token_id=of.eos.tolist() or None,
            **cached,
        )
        self._take(out[:, length:], attachment, ends)
        more = out.shape[1] - self.start < of.max_new_tokens
        going = (~ends.ended).nonzero().flatten() if more else ends.ended.new_zeros(0).long()
        self.rows = [self.rows[row] for row in going.tolist()]
        if self.rows:
            self.ids, grown = out[going], out.new_ones(len(going), out.shape[1] - length)
            self.mask = torch.cat([self.mask[going], grown], 1)
            self.cache.batch_select_indices(going)

    def _take(self, new: torch.Tensor, attachment: Attachment, ends: Ends) -> None:
        """Adds what was drawn to its requests."""
        T, kept, top_p = (
            None if steps[0] is None else torch.stack(steps, 1)
            for steps in zip(*attachment.records)
        )
        kept = torch.where(T < GREEDY_BELOW, 1, kept)
        columns = (each.tolist() for each in (new, T, kept, ends.length, ends.ended))
        for at, (request, *of_row) in enumerate(zip(self.rows, *columns)):
            tokens, temperatures, sizes, n, ended = of_row
            row = self.drawn[request]
            row.tokens += tokens[:n]
            row.temperature += [round(t, 4) for t in temperatures[:n]]
            row.kept += sizes[:n]
            if top_p is not None:
                row.top_p = (row.top_p or []) + [round(p, 4) for p in top_p[at, :n].tolist()]
            row.ended = ended
