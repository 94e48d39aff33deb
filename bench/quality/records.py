"""Records of a schema as a policy writes them: how many are valid, how much they vary."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from autodeco_fast.policies import Policy
from autodeco_fast.training.base_model import BaseModel
from bench.quality.schemas import Schema

NEW_TOKENS = 48  # of a record at most
OF = 32  # valid records that entropies are taken over
SAMPLES = 64  # of a schema under a policy


@dataclass(frozen=True)
class Written:
    """What a policy wrote for a schema."""

    schema: str
    texts: list[str]
    valid: list[bool]
    records: list[dict]  # the valid ones
    temperature: float  # mean over tokens
    tokens: int

    @property
    def share(self) -> float:
        return sum(self.valid) / len(self.valid)

    @property
    def distinct(self) -> float:
        """Share of samples that are valid and the first of their kind."""
        return len({str(sorted(r.items())) for r in self.records}) / len(self.valid)


def entropies(records: list[dict], fields: tuple[str, ...]) -> dict[str, float]:
    """Entropy of each field's values over the first `OF` records, over its highest possible; 0 for
    fewer than two records."""
    some = records[:OF]
    if len(some) < 2:
        return dict.fromkeys(fields, 0.0)
    found = {}
    for name in fields:
        counts = Counter(str(record[name]).strip().lower() for record in some).values()
        nats = -sum(n / len(some) * math.log(n / len(some)) for n in counts)
        found[name] = nats / math.log(len(some))
    return found


class Writer:
    """A model that continues a schema's prompt, many samples at once; the prompt runs once."""

    def __init__(self, base: BaseModel, tokenizer):
        self.base, self.tokenizer = base, tokenizer
        size = base.weight.shape[0]
        texts = (tokenizer.decode([i]) for i in range(size))
        ends = [("\n" in text) or i == tokenizer.eos_token_id for i, text in enumerate(texts)]
        self.ends = torch.tensor(ends)

    @torch.inference_mode()
    def write(
        self, schema: Schema, policy: Policy, *, seed: int, samples: int = SAMPLES
    ) -> Written:
        """Under a policy of `autodeco_fast.policies`; sample i is the same whatever `samples` is."""
        ids = torch.tensor([self.tokenizer(schema.prompt).input_ids])
        cache = DynamicCache(config=self.base.model.config)
        hidden = self._forward(ids, cache)[:, -1:]
        cache.batch_repeat_interleave(samples)
        hidden, rows = hidden.expand(samples, -1, -1), torch.arange(samples)
        tokens = torch.full((samples, NEW_TOKENS), -1)
        temperatures = 0.0
        for position in range(NEW_TOKENS):
            last = hidden[:, -1]
            logits = self.base.logits(last)
            token = policy.sample(last, logits, seed=seed, position=position, stream=rows).token
            tokens[rows, position] = token
            temperatures += float(policy.temperatures(last, logits).sum())
            going = (~self.ends[token]).nonzero()[:, 0]
            if not len(going) or position == NEW_TOKENS - 1:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
            rows, last = rows[going], token[going]
            hidden = self._forward(last[:, None], cache)
        count = int((tokens >= 0).sum())
        texts = [self.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in tokens]
        parsed = [schema.parse(text) for text in texts]
        return Written(
            schema.name,
            texts,
            valid=[record is not None for record in parsed],
            records=[record for record in parsed if record is not None],
            temperature=temperatures / count,
            tokens=count,
        )

    def _forward(self, ids: torch.Tensor, cache) -> torch.Tensor:
        out = self.base.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return out.last_hidden_state
