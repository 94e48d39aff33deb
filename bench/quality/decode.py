"""Many continuations of one prompt under a policy: the prompt runs once, rows that ended leave."""

import torch
from transformers import DynamicCache

from autodeco_fast.policies import Policy
from autodeco_fast.training.base_model import BaseModel


@torch.inference_mode()
def continue_prompt(
    base: BaseModel,
    policy: Policy,
    prompt: list[int],
    *,
    ends: torch.Tensor,
    samples: int,
    new_tokens: int,
    seed: int,
) -> tuple[torch.Tensor, float]:
    """Token ids `[samples, new_tokens]`, −1 after the end, and the mean temperature over them.

    Row i is the same whatever `samples` is: the noise of a row is its number's.

    Args:
        ends: bool `[V]`, the ids after which a row ends.
    """
    cache = DynamicCache(config=base.model.config)
    hidden = _forward(base, torch.tensor([prompt]), cache)[:, -1:]
    cache.batch_repeat_interleave(samples)
    hidden, rows = hidden.expand(samples, -1, -1), torch.arange(samples)
    tokens, temperatures = torch.full((samples, new_tokens), -1), 0.0
    for position in range(new_tokens):
        last = hidden[:, -1]
        logits = base.logits(last)
        token = policy.sample(last, logits, seed=seed, position=position, stream=rows).token
        tokens[rows, position] = token
        temperatures += float(policy.temperatures(last, logits).sum())
        going = (~ends[token]).nonzero()[:, 0]
        if not len(going) or position == new_tokens - 1:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, token = rows[going], token[going]
        hidden = _forward(base, token[:, None], cache)
    return tokens, temperatures / int((tokens >= 0).sum())


def _forward(base: BaseModel, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    out = base.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return out.last_hidden_state
