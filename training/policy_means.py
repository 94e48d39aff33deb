"""Coverage, temperature, kept-set size and likelihood of policies on a scan's tokens: their logits
are made again."""

import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training.base_model import BaseModel, load
from autodeco_fast.training.calibrate import cut_of, predict, required
from autodeco_fast.training.evaluate import Tokens, means, per_document_means
from autodeco_fast.training.scan import lm_head_fingerprint
from autodeco_fast.training.scan_store import Scan, ScanTokens

SAMPLE = 4096


def scanned_model(scan: Scan, model: str | None = None) -> BaseModel:
    """The model that was scanned, from where it was or from `model`.

    Raises:
        ValueError: if there is none, or it is another.
    """
    name = model or scan.manifest["settings"]["model"]
    base = load(name, torch.bfloat16)
    if lm_head_fingerprint(base) != scan.manifest["lm_head"]:
        raise ValueError(f"model {name!r} is not the one that was scanned: its lm_head is another")
    return base


def sample(tokens: ScanTokens) -> torch.Tensor:
    """Indices of at most `SAMPLE` tokens, always the same."""
    return (
        torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        .sort()
        .values
    )


def policy_means(
    tokens: ScanTokens, base: BaseModel, policies: dict[str, torch.Tensor], min_p: float
) -> dict[str, dict[str, float]]:
    """The four measures of every policy, a temperature for each token."""
    hidden, target = tokens.hidden.to(base.weight.dtype), tokens.target.long()
    _, document = torch.unique(tokens.document, return_inverse=True)
    sums = per_document_means(
        Tokens(hidden, target, document, base.stats(hidden, target)),
        base,
        policies,
        min_p,
        lambda n: None,
    )
    return {name: means(value) for name, value in sums.items()}


def of_heads(scan: Scan, heads: list[TemperatureHead]) -> list[dict[str, float]]:
    """Coverage, mean temperature, kept-set size and the oracle's kept-set size of heads, each at
    its Min-P.

    Raises:
        ValueError: if the scanned model is not there any more.
    """
    base, tokens = scanned_model(scan), scan.load()
    tokens = tokens.rows(sample(tokens))
    found = []
    for head in heads:
        min_p = cut_of(head)
        policies = {
            "head": torch.from_numpy(predict(head, tokens)),
            "oracle": torch.from_numpy(required(tokens, min_p)).clamp(max=head.max_temperature),
        }
        measured = policy_means(tokens, base, policies, min_p)
        found.append({**measured["head"], "oracle_kept": measured["oracle"]["kept"]})
    return found
