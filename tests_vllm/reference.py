"""What an engine must have done, from a forward of transformers with the head in fp64."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from autodeco_fast import TemperatureHead

# Of |Δ log p| at T ≥ 0.2, twice the largest that was seen (3.2e-5): CPUs round logits in their own
# ways. Errors grow as 1/T.
TOLERANCE = 6e-5


@dataclass(frozen=True)
class Rows:
    """The positions of a completion at which its tokens were drawn."""

    hidden: torch.Tensor  # [n, H] fp64
    logits: torch.Tensor  # [n, V] fp64, the model's own


@torch.no_grad()
def rows(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Rows:
    ids = torch.tensor([[*prompt, *tokens]])
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    try:
        logits = model(input_ids=ids).logits[0]
    finally:
        hook.remove()
    at = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
    return Rows(seen[0][at].double(), logits[at].double())


@torch.no_grad()
def temperatures(head: TemperatureHead, hidden: torch.Tensor) -> torch.Tensor:
    """T `[n]` in fp64, the offset of calibration included, by hand."""
    first, _, last = head.mlp
    layer = torch.relu(hidden @ first.weight.double().T + first.bias.double())
    T = torch.sigmoid(layer @ last.weight.double().T + last.bias.double()).squeeze(-1)
    return (head.max_temperature * T + head.offset).clamp(0, head.max_temperature)


def log_probs(logits: torch.Tensor, T: torch.Tensor | float) -> torch.Tensor:
    T = torch.as_tensor(T, dtype=torch.float64).reshape(-1, 1)
    return (logits / T).log_softmax(1)


def cut(logits: torch.Tensor, T: torch.Tensor | float, min_p: float) -> torch.Tensor:
    """The lowest logit of the kept set, `[n]`."""
    T = torch.as_tensor(T, dtype=torch.float64)
    return logits.max(1).values + T * math.log(min_p)


def assert_drawn_inside(
    logits: torch.Tensor, tokens: list[int], T: torch.Tensor | float, min_p: float
) -> None:
    """Every token is in the kept set of Min-P at T."""
    z = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    outside = z < cut(logits, T, min_p) - 1e-4
    assert not outside.any(), (outside.nonzero().flatten().tolist(), tokens)


def assert_log_probs(
    reported: list[dict[str, float]], logits: torch.Tensor, T: torch.Tensor, min_p: float
) -> None:
    """What was reported of the kept set is `log softmax(z/T)`."""
    expected, least = log_probs(logits, T), cut(logits, T, min_p)
    for n, position in enumerate(reported):
        inside = logits[n] >= least[n]
        ids = inside.nonzero().flatten().tolist()
        got = torch.tensor([position[str(i)] for i in ids], dtype=torch.float64)
        error = (got - expected[n][inside]).abs().max().item()
        assert error <= TOLERANCE * max(1.0, 0.2 / float(T[n])), (n, error, float(T[n]))
    assert len(reported) == len(logits) > 0


@dataclass(frozen=True)
class Drawn:
    """The distribution that a row's token was to be drawn from."""

    log_probs: torch.Tensor  # [V] fp64, −inf outside the kept set
    doubtful: torch.Tensor  # [V] bool: so near the cut that rounding decides

    def assert_equals(self, reported: dict[str, float], T: float) -> None:
        """Processed log-probabilities of a row are these."""
        got = torch.full_like(self.log_probs, -math.inf)
        for token, value in reported.items():
            got[int(token)] = value if math.exp(value) > 0 else -math.inf
        sure = ~self.doubtful
        assert torch.equal(got.isfinite()[sure], self.log_probs.isfinite()[sure])
        if self.doubtful.any():
            return
        inside = self.log_probs.isfinite()
        error = (got[inside] - self.log_probs[inside]).abs().max().item()
        assert error <= TOLERANCE * max(1.0, 0.2 / T), (error, T)


def drawn_from(logits: torch.Tensor, T: float, *, min_p: float = 0.0, top_p: float = 1.0) -> Drawn:
    """softmax(logits / T) cut at top-p or Min-P and normalised.

    Args:
        logits: `[V]` fp64.
    """
    z = logits / T
    inside, doubtful = torch.ones_like(z, dtype=torch.bool), torch.zeros_like(z, dtype=torch.bool)
    if min_p > 0:
        over = z - (z.max() + math.log(min_p))
        inside &= over >= 0
        doubtful |= over.abs() < 1e-4 / min(T, 1.0)
    if top_p < 1:
        p, order = z.softmax(0).sort(descending=True)
        before = torch.empty_like(p)
        before[order] = p.cumsum(0) - p
        inside &= (before < top_p) | (before == 0)
        doubtful |= (before - top_p).abs() < 1e-4
    return Drawn(z.masked_fill(~inside, -math.inf).log_softmax(0), doubtful)
