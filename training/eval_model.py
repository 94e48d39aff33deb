"""Samples of a model on this machine, many prompts and samples at a time.

Prompts are left-padded. A prompt that several rows of a batch share is read once and its cache
repeated. Once half of a batch's rows have ended the others go on without them. Noise depends on
(seed, position) alone, so neither changes a sample, up to the rounding of matrix products.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from autodeco_fast import Attachment, attach
from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.policies import Policy
from autodeco_fast.training.base_model import left_padded, positions, wrap
from autodeco_fast.training.drawing import (
    LeadIn,
    StopStrings,
    Stretch,
    completion_text,
    ends_of,
    lead_in,
    plain,
    prefilled,
    stretches,
)
from autodeco_fast.training.eval_requests import Draw, Drawn, Request
from autodeco_fast.training.head_folder import check_model
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
        self.leads = [lead_in(tokenizer, p.content, ids) for p, ids in zip(prompts, self.ids)]
        device = model.device
        self.eos = torch.tensor(ends_of(model, tokenizer, stop), device=device).long()
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
        if folder is not None:
            check_model(folder, lambda: lm_head_fingerprint(wrap(self.model)))

    @contextmanager
    def under(self, policy: Policy) -> Iterator[Draw]:
        """Yields what draws a batch of samples under a policy."""
        with plain(self.model), attach(self.model, policy, record=True) as attachment:
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
        ids, mask = left_padded([self.ids[r.prompt] for r in requests], self.pad, self.model.device)
        seeds = torch.tensor([request.seed for request in requests])
        drawn = [_Row([], [], []) for _ in requests]
        leads = [self.leads[request.prompt] for request in requests]
        for stretch in stretches(
            self.model,
            ids,
            mask,
            # A memory would not survive the thinning.
            cache=None if policy.remembers else self._prefilled(requests, ids, mask),
            strings=self.strings,
            leads=leads,
            eos=self.eos,
            max_new_tokens=self.max_new_tokens,
            of_rows={"seed": seeds},
            pad_token_id=self.pad,
        ):
            _take(drawn, stretch, attachment)
        return [self._drawn(row, lead) for row, lead in zip(drawn, leads)]

    def _prefilled(
        self, requests: Sequence[Request], ids: torch.Tensor, mask: torch.Tensor
    ) -> DynamicCache | None:
        """Reads each prompt once, if the model's cache can be repeated and thinned."""
        numbers = [request.prompt for request in requests]
        first = list(dict.fromkeys(numbers))
        once = [numbers.index(number) for number in first]
        copies = torch.tensor([first.index(number) for number in numbers])
        return prefilled(self.model, ids[once], mask[once], copies)

    def _drawn(self, row: "_Row", lead: LeadIn) -> Drawn:
        ends, stop = self.eos.tolist(), self.strings.stop
        return Drawn(
            text=completion_text(self.tokenizer, row.tokens, lead=lead, ends=ends, stop=stop),
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


def _take(drawn: list[_Row], stretch: Stretch, attachment: Attachment) -> None:
    """Adds to the requests' rows what was drawn for them."""
    T, kept, top_p = (
        None if steps[0] is None else torch.stack(steps, 1) for steps in zip(*attachment.records)
    )
    kept, ends = torch.where(T < GREEDY_BELOW, 1, kept), stretch.ends
    columns = (
        each.tolist() for each in (stretch.rows, stretch.new, T, kept, ends.length, ends.ended)
    )
    for at, (request, tokens, temperatures, sizes, n, ended) in enumerate(zip(*columns)):
        row = drawn[request]
        row.tokens += tokens[:n]
        row.temperature += [round(t, 4) for t in temperatures[:n]]
        row.kept += sizes[:n]
        if top_p is not None:
            row.top_p = (row.top_p or []) + [round(p, 4) for p in top_p[at, :n].tolist()]
        row.ended = ended
