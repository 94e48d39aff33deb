"""What a temperature policy buys on reference text: coverage, temperature, kept-set size and
likelihood, per document.

Over tokens with logits z, reference y and temperature T:

    covered  z_y ≥ z_max + T·ln p_min        kept  |{i: z_i ≥ z_max + T·ln p_min}|        nll  −ln softmax(z/T)_y
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autodeco_fast import TemperatureHead, TokenStats, min_p_hinge_loss, required_temperature
from autodeco_fast.training.base_model import BaseModel

CHUNK = 2048  # tokens whose logits are held at a time
MEASURES = ("coverage", "temperature", "kept", "nll")


@dataclass
class Tokens:
    """Every predicted token of some documents."""

    hidden: torch.Tensor  # [N, H] what enters the output embedding
    target: torch.Tensor  # [N] int64
    document: torch.Tensor  # [N] int64, index of the document
    stats: TokenStats


@torch.inference_mode()
def collect(
    base: BaseModel,
    tokenizer,
    texts: list[str],
    window: int,
    per_document: int,
    tick: Callable[[int], None],
) -> Tokens:
    """Runs the base model once over windows of the documents, keeping hidden states instead of
    logits.

    Args:
        texts: one string a document.
        window: tokens of context at most.
        per_document: tokens taken from the beginning of each document at most.
        tick: called with the number of documents done.

    Raises:
        ValueError: if there is no token to predict.
    """
    hidden, target, document = [], [], []
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for index, text in enumerate(texts):
        ids = ([] if start is None else [start]) + tokenizer(
            text[: 8 * per_document], add_special_tokens=False
        ).input_ids
        ids = ids[: per_document + 1]
        for at in range(0, len(ids) - 1, window):
            piece = torch.tensor(ids[at : at + window + 1])
            if len(piece) > 1:
                hidden.append(base.hidden(piece[None, :-1])[0].float())
                target.append(piece[1:])
                document.append(torch.full_like(piece[1:], index))
        tick(1)
    if not target:
        raise ValueError("the texts hold no tokens to predict")
    h, y = torch.cat(hidden), torch.cat(target)
    return Tokens(h, y, torch.cat(document), base.stats(h, y))


def fit_head(
    tokens: Tokens, *, gravity: float, min_p: float, seed: int, epochs: int = 6, batch: int = 2048
) -> TemperatureHead:
    """Trains a head for a Min-P cut on cached hidden states: AdamW, cosine to zero."""
    torch.manual_seed(seed)
    head = TemperatureHead(tokens.hidden.shape[1], min_p=min_p)
    count = len(tokens.target)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-count // batch))
    for _ in range(epochs):
        for index in torch.randperm(count).split(batch):
            stats = tokens.stats.rows(index)
            loss = min_p_hinge_loss(head(tokens.hidden[index]), stats, min_p=min_p, gravity=gravity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


@torch.inference_mode()
def per_document_means(
    tokens: Tokens,
    base: BaseModel,
    policies: dict[str, torch.Tensor],
    min_p: float,
    tick: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Sums of the four measures by document, from one pass over the logits.

    Args:
        policies: name → `[N]` temperatures.
        tick: called with the number of tokens done.

    Returns:
        name → `[documents, 5]` fp64: covered, temperature, kept, nll, tokens.
    """
    cut = math.log(min_p)
    documents = int(tokens.document.max()) + 1
    sums = {name: torch.zeros(documents, 5, dtype=torch.float64) for name in policies}
    for at in range(0, len(tokens.target), CHUNK):
        part = slice(at, at + CHUNK)
        z = base.logits(tokens.hidden[part]).sub_(tokens.stats.max_logit[part, None])
        z_y = z.gather(1, tokens.target[part, None])[:, 0]
        for name, temperature in policies.items():
            T = temperature[part].clamp(min=1e-3)
            threshold = T * cut
            measures = [
                (z_y >= threshold).double(),
                temperature[part].double(),
                (z >= threshold[:, None]).sum(-1).double(),
                ((z / T[:, None]).logsumexp(-1) - z_y / T).double(),
                torch.ones_like(z_y, dtype=torch.float64),
            ]
            sums[name].index_add_(0, tokens.document[part], torch.stack(measures, 1))
        tick(len(z))
    return sums


def means(sums: torch.Tensor) -> dict[str, float]:
    """The four measures over all tokens of `[documents, 5]` sums."""
    total = sums.sum(0)
    return dict(zip(MEASURES, (total[:4] / total[4]).tolist()))


def fixed_at_equal(fixed: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Coverage on the fixed-temperature curve where measure `axis` equals `value`, linear between
    its points.

    Args:
        fixed: `[draws, temperatures, 4]` measures, growing along `axis`.
        value: `[draws]`; values outside the curve take its end.
    """
    x, y = fixed[:, :, axis].contiguous(), fixed[:, :, 0]
    right = torch.searchsorted(x, value[:, None].contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1)[:, 0], x.gather(1, right)[:, 0]
    y0, y1 = y.gather(1, right - 1)[:, 0], y.gather(1, right)[:, 0]
    share = ((value - x0) / (x1 - x0)).clamp(0, 1)
    return y0 + share * (y1 - y0)


def compare(
    head: torch.Tensor, fixed: list[torch.Tensor], axis: int, seed: int, draws: int = 1000
) -> tuple[float, float, float]:
    """Coverage of a head minus that of the best fixed temperature at equal measure `axis`, with a
    95 % bootstrap interval.

    Documents are drawn with replacement, `draws` times.
    """
    documents = head.shape[0]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(documents, (draws, documents), generator=generator)
    picks = torch.cat([torch.arange(documents)[None], picks])  # the first row is the sample itself
    counts = torch.zeros(draws + 1, documents, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks).double()
    )

    def resampled(sums: torch.Tensor) -> torch.Tensor:
        total = counts @ sums
        return total[:, :4] / total[:, 4:]

    ours = resampled(head)
    curve = torch.stack([resampled(f) for f in fixed], 1)
    difference = ours[:, 0] - fixed_at_equal(curve, axis, ours[:, axis])
    low, high = difference[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference[0].item(), low, high


def v_curve(
    tokens: Tokens, temperature: torch.Tensor, min_p: float, bins: int = 20
) -> list[tuple[float, float, float]]:
    """(mean gap, mean predicted T, mean required T) in quantile bins of the gap; T* ≤ 2 only, gap 0
    apart."""
    gap = tokens.stats.max_logit - tokens.stats.target_logit
    need = required_temperature(tokens.stats, min_p)
    order = gap.argsort()
    order = order[need[order] <= 2.0]
    zero = int((gap[order] == 0).sum())  # the reference is the argmax: one bin of its own
    return [
        (gap[i].mean().item(), temperature[i].mean().item(), need[i].mean().item())
        for i in (order[:zero], *order[zero:].tensor_split(bins))
        if len(i)
    ]
