"""Records of a schema as a policy writes them: how many are valid, how much they vary."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from autodeco_fast.policies import Policy
from autodeco_fast.training.base_model import BaseModel
from bench.quality.decode import continue_prompt
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

    def write(
        self, schema: Schema, policy: Policy, *, seed: int, samples: int = SAMPLES
    ) -> Written:
        """Under a policy; sample i is the same whatever `samples` is."""
        tokens, temperature = continue_prompt(
            self.base,
            policy,
            self.tokenizer(schema.prompt).input_ids,
            ends=self.ends,
            samples=samples,
            new_tokens=NEW_TOKENS,
            seed=seed,
        )
        rows = (row[row >= 0] for row in tokens)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        parsed = [schema.parse(text) for text in texts]
        return Written(
            schema.name,
            texts,
            valid=[record is not None for record in parsed],
            records=[record for record in parsed if record is not None],
            temperature=temperature,
            tokens=int((tokens >= 0).sum()),
        )
