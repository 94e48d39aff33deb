"""What a temperature policy buys on reference text: four measures, by document.

Over tokens with logits z, reference y and temperature T:

    covered  z_y ≥ z_max + T·ln p_min        kept set  {i: z_i ≥ z_max + T·ln p_min}
    nll      −ln softmax(z/T)_y

A scan keeps no logits, so they are made again from its hidden states, which it rounded to bf16:
what depends on the last bits of a gap, as the oracle does, takes it from the logits made again.
"""

import math
from collections.abc import Sequence, Sized

import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training.base_model import BaseModel, frozen_dtype, load
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.head_folder import min_p_of
from autodeco_fast.training.predictions import predict
from autodeco_fast.training.scan import lm_head_fingerprint
from autodeco_fast.training.scan_store import Scan, ScanTokens
from autodeco_fast.training.token_uniform import held_out

CHUNK_LOGITS = 1 << 20  # are held at a time: more would leave the caches
SAMPLE = 4096  # tokens of a scan that are looked at
MEASURES = ("coverage", "temperature", "kept_set_size", "nll")
_BEYOND_ROUNDING = 1 + 1e-5  # of T*: a token at its own T* lies on the cut


def scanned_model(
    scan: Scan, model: str | None = None, device: torch.device | str = "cpu"
) -> BaseModel:
    """The model that was scanned, from where it was or from `model`.

    Raises:
        ValueError: if there is none, or it is another.
    """
    name = model or scan.manifest["settings"]["model"]
    base = load(name, frozen_dtype(device), device)
    if lm_head_fingerprint(base) != scan.manifest["lm_head"]:
        raise ValueError(f"model {name!r} is not the one that was scanned: its lm_head is another")
    return base


def sample_of(tokens: Sized) -> torch.Tensor:
    """Indices of at most `SAMPLE` tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(tokens), generator=generator)[:SAMPLE].sort().values


@torch.inference_mode()
def sums_by_document(
    tokens: ScanTokens,
    base: BaseModel,
    policies: dict[str, torch.Tensor | None],
    *,
    min_p: float,
    max_temperature: float = 2.0,
    weight: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Sums of the four measures, from one pass over the logits.

    Args:
        policies: name → `[n]` temperatures; None for the oracle, which takes T*, or
            `max_temperature` where that is less.
        weight: `[n]` tokens of the text that each stands for; None: one.

    Returns:
        name → `[documents, 5]` fp64: covered, temperature, kept-set size, nll, weight of the
        tokens.
    """
    cut, hidden, target = math.log(min_p), tokens.hidden, tokens.target.long()
    names, document = torch.unique(tokens.document, return_inverse=True)
    sums = {name: torch.zeros(len(names), 5, dtype=torch.float64) for name in policies}
    size = max(1, CHUNK_LOGITS // base.vocabulary)
    for start in range(0, len(target), size):
        chunk = slice(start, start + size)
        z = base.logits(hidden[chunk])
        z = z.sub_(z.amax(-1, keepdim=True))
        z_y = z.gather(1, target[chunk, None])[:, 0]
        oracle = (z_y / cut * _BEYOND_ROUNDING).clamp(max=max_temperature)
        for name, temperatures in policies.items():
            temperature = oracle if temperatures is None else temperatures[chunk]
            columns = torch.stack(_of_chunk(z, z_y, temperature, cut), 1)
            if weight is not None:
                columns *= weight[chunk, None]
            sums[name].index_add_(0, document[chunk], columns)
    return sums


def _of_chunk(
    z: torch.Tensor, z_y: torch.Tensor, temperature: torch.Tensor, cut: float
) -> list[torch.Tensor]:
    """The columns of the sums, `[n]` fp64 each, from logits `[n, V]` less their maxima."""
    T = temperature.clamp(min=1e-3)
    threshold = T * cut
    # A comparison into floats, since sums of bools are slow; no maximum is to be sought again.
    inside = torch.ge(z, threshold[:, None], out=torch.empty_like(z))
    size = inside.sum(-1)
    log_mass = torch.mul(z, 1 / T[:, None], out=inside).exp_().sum(-1).log()
    columns = (z_y >= threshold, temperature, size, log_mass - z_y / T, torch.ones_like(T))
    return [column.double() for column in columns]


@torch.inference_mode()
def nucleus_widths(
    tokens: ScanTokens, base: BaseModel, *, mass: float, min_p: float
) -> torch.Tensor:
    """The lowest temperature at which Min-P's kept set has this mass of the model's own
    probability. fp32 `[n]`

    It is the gap of the last token of top-p's set over −ln p_min: what a head without labels
    learns where it is within reach, known without one.
    """
    widths, size = [], max(1, CHUNK_LOGITS // base.vocabulary)
    for hidden in tokens.hidden.split(size):
        z = base.logits(hidden)
        widths.append(_gap_of_mass(z.sub_(z.amax(-1, keepdim=True)), mass))
    return torch.cat(widths).div_(-math.log(min_p))


def _gap_of_mass(z: torch.Tensor, mass: float, most: int = 1024) -> torch.Tensor:
    """The gap of the last token that a set of the largest logits needs to have this mass; from
    logits less their maxima.

    Sorted no further than `most` tokens, but for rows that need more.
    """
    log_total = z.logsumexp(-1, keepdim=True)
    top = z.topk(min(most, z.shape[1]), -1).values
    reached = (top - log_total).exp_().cumsum(-1) >= mass
    # Rounding may keep the sum of all below 1.
    last = reached.int().argmax(-1).masked_fill(~reached[:, -1], top.shape[1] - 1)
    gap = -top.gather(1, last[:, None])[:, 0]
    more = (~reached[:, -1]).nonzero()[:, 0]
    if len(more) and top.shape[1] < z.shape[1]:
        gap[more] = _gap_of_mass(z[more], mass, z.shape[1])
    return gap


def means(sums: torch.Tensor) -> dict[str, float]:
    """The four measures over all tokens of `[documents, 5]` sums."""
    total = sums.sum(0)
    return dict(zip(MEASURES, (total[:4] / total[4]).tolist()))


def fixed_at_equal(fixed: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Coverage on the fixed-temperature curve where measure `axis` equals `value`, linear between
    its points.

    Args:
        fixed: `[resamples, temperatures, 4]` measures, growing along `axis`.
        value: `[resamples]`; values outside the curve take its end.
    """
    x, y = fixed[:, :, axis].contiguous(), fixed[:, :, 0]
    right = torch.searchsorted(x, value[:, None].contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1)[:, 0], x.gather(1, right)[:, 0]
    y0, y1 = y.gather(1, right - 1)[:, 0], y.gather(1, right)[:, 0]
    share = ((value - x0) / (x1 - x0)).nan_to_num(0.0).clamp(0, 1)  # two equal points: either
    return y0 + share * (y1 - y0)


def compare(
    head: torch.Tensor, fixed: list[torch.Tensor], axis: int, seed: int, resamples: int = 1000
) -> tuple[float, float, float]:
    """Coverage of a head minus that of the best fixed temperature at equal measure `axis`, with a
    95 % bootstrap interval.

    Documents are resampled with replacement, `resamples` times.
    """
    documents = head.shape[0]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(documents, (resamples, documents), generator=generator)
    picks = torch.cat([torch.arange(documents)[None], picks])  # the first is all of them, once
    counts = torch.zeros(resamples + 1, documents, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks).double()
    )

    def resampled(sums: torch.Tensor) -> torch.Tensor:
        total = counts @ sums
        return total[:, :4] / total[:, 4:]

    ours = resampled(head)
    curve = torch.stack([resampled(f) for f in fixed], 1)
    difference = ours[:, 0] - fixed_at_equal(curve, axis, ours[:, axis])
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    # One document says nothing of others: the interval is all there can be.
    low, high = difference[1:].quantile(levels).tolist() if documents > 1 else (-1.0, 1.0)
    return difference[0].item(), low, high


def _sample(scan: Scan, *held: float) -> ScanTokens:
    """`SAMPLE` tokens of a scan, of which no more are held; of the documents that (seed, share)
    hold out, if they are given."""
    if not held:
        return scan.rows(sample_of(range(len(scan))))
    seed, share = held
    index = held_out(seed, scan.example(scan.documents()), share).nonzero()[:, 0]
    return scan.rows(index[sample_of(index)])


def measures_of_heads(
    scan: Scan, runs: Sequence[tuple[TemperatureHead, TrainConfig]]
) -> list[dict[str, float]]:
    """The four measures of heads, each at its Min-P, and the oracle's kept-set size.

    Tokens are those of the documents that a run held out, of all where it held out none. They are
    weighted, so that they speak for the trivial ones that the scan left out.

    Args:
        runs: heads, each with the settings that it was trained by on this scan.

    Raises:
        ValueError: if the scanned model is not there any more.
    """
    base, found, samples = scanned_model(scan), [], {}
    for head, config in runs:
        which = (config.seed, config.eval_fraction) if config.eval_fraction else ()
        if which not in samples:
            samples[which] = _sample(scan, *which)
        tokens = samples[which]
        sums = sums_by_document(
            tokens,
            base,
            {"head": torch.from_numpy(predict(head, tokens)), "oracle": None},
            min_p=min_p_of(head),
            max_temperature=head.max_temperature,
            weight=scan.weight(tokens),
        )
        found.append(
            {**means(sums["head"]), "oracle_kept_set_size": means(sums["oracle"])["kept_set_size"]}
        )
    return found
