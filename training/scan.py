"""The scan: one forward pass of the frozen model over the data, of which everything a head learns
from is written down.

Work is cut into blocks of `rows_per_shard` rows, dealt out to the processes; a block becomes one
shard, whole or not at all, and carries its own counts. So a scan that was killed continues where it
was: blocks that are there are not done again, and nothing is counted twice. What is kept at random
is decided by numbers that belong to the token (`training/token_noise.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from autodeco_fast import TokenStats
from autodeco_fast.losses import IMPOSSIBLE, MIDDLE, TRIVIAL, difficulty
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.config import ScanConfig
from autodeco_fast.training.data import IGNORED, Row, encode, stream_rows
from autodeco_fast.training.scan_store import (
    COUNTS,
    MANIFEST,
    ScanTokens,
    fingerprint,
    read_facts,
    read_manifest,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from autodeco_fast.training.token_noise import uniform

SCAN_EPOCH = 2**32 - 1  # of a scan's uniform numbers; epochs of training count from 0
_BUCKETS = {"trivial": TRIVIAL, "middle": MIDDLE, "impossible": IMPOSSIBLE}
_LIVE_SETTINGS = ("batch_tokens", "output")  # may change when a scan is continued


def pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels `[B, L]` of rows padded on the right."""
    length = max(len(row.input_ids) for row in rows)

    def fill(values, value):
        return values + [value] * (length - len(values))

    return (
        torch.tensor([fill(row.input_ids, 0) for row in rows]),
        torch.tensor([fill([1] * len(row.input_ids), 0) for row in rows]),
        torch.tensor([fill(row.labels, IGNORED) for row in rows]),
    )


def batches_by_length(
    rows: list[tuple[int, Row]], batch_tokens: int
) -> Iterator[list[tuple[int, Row]]]:
    """Batches of rows of about the same length, at most `batch_tokens` with padding; one row at
    least."""
    batch: list[tuple[int, Row]] = []
    for item in sorted(rows, key=lambda item: -len(item[1].input_ids)):
        if batch and len(batch[0][1].input_ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def uniform_of_scan(document: torch.Tensor, position: torch.Tensor, seed: int) -> torch.Tensor:
    """The numbers in [0, 1) that decide what a scan keeps."""
    return uniform(seed, SCAN_EPOCH, document, position)


def _bucket(stats: TokenStats, config: ScanConfig) -> torch.Tensor:
    return difficulty(stats, max_rank=config.max_rank, trivial_prob=config.trivial_prob)


def _kept(
    bucket: torch.Tensor, uniforms: torch.Tensor, config: ScanConfig, share: float
) -> torch.Tensor:
    """All of the middle, `easy_fraction` of the trivial, none of the impossible, or all tokens; of
    these, a share."""
    if config.all_tokens:
        return (bucket >= 0) & (uniforms < share)
    return ((bucket == MIDDLE) & (uniforms < share)) | (
        (bucket == TRIVIAL) & (uniforms < share * config.easy_fraction)
    )


@torch.inference_mode()
def scan_batch(
    base: BaseModel,
    batch: list[tuple[int, Row]],
    config: ScanConfig,
    share: float,
    counts: dict[str, int],
) -> ScanTokens:
    """The tokens of some rows that are kept; adds to the counts."""
    device = base.weight.device
    ids, mask, labels = (t.to(device) for t in pad([row for _, row in batch]))
    wanted = labels[:, 1:] != IGNORED
    document = torch.tensor([number for number, _ in batch], device=device)[:, None].expand(
        wanted.shape
    )[wanted]
    position = torch.arange(1, ids.shape[1], device=device).expand(wanted.shape)[wanted]
    hidden, target = base.hidden(ids, mask)[:, :-1][wanted], labels[:, 1:][wanted]
    stats = base.stats(hidden, target)
    finite = stats.logsumexp.isfinite()  # a NaN or an infinity in a hidden state is in every logit
    counts["seen"] += len(target)
    counts["not_finite"] += int((~finite).sum())
    bucket = torch.where(finite, _bucket(stats, config), -1)
    kept = _kept(bucket, uniform_of_scan(document, position, config.seed), config, share)
    for name, value in _BUCKETS.items():
        counts[name] += int((bucket == value).sum())
    _count_kept(counts, bucket, kept)
    probability = (stats.target_logit - stats.logsumexp).exp()
    rows = (
        hidden.bfloat16(),
        stats.max_logit - stats.target_logit,
        probability,
        stats.entropy,
        stats.rank,
        target,
    )
    floats, integers = rows[:4], (*rows[4:], document, position)
    return ScanTokens(*(x[kept].cpu() for x in floats), *(x[kept].int().cpu() for x in integers))


def thin(path: Path, hidden_size: int, config: ScanConfig, share: float) -> int:
    """Keeps a smaller share of a shard's tokens; returns how many are left."""
    counts, before, n = read_facts(path, hidden_size)
    if before <= share:
        return n
    tokens = read_shard(path)
    bucket = _bucket(tokens.stats(), config)
    kept = _kept(
        bucket, uniform_of_scan(tokens.document, tokens.position, config.seed), config, share
    )
    counts |= dict.fromkeys((f"kept_{name}" for name in _BUCKETS), 0)
    _count_kept(counts, bucket, kept)
    write_shard(path, tokens.rows(kept), counts, share)
    return int(kept.sum())


def _count_kept(counts: dict[str, int], bucket: torch.Tensor, kept: torch.Tensor) -> None:
    for name, value in _BUCKETS.items():
        counts[f"kept_{name}"] += int(((bucket == value) & kept).sum())


def _blocks(config: ScanConfig, vocabulary: int) -> Iterator[list[dict]]:
    rows = stream_rows(config.data, config.split, vocabulary)
    while block := list(islice(rows, config.rows_per_shard)):
        yield block


def begin(config: ScanConfig, base: BaseModel, tokenizer) -> dict:
    """The manifest of a scan that begins or continues.

    Raises:
        ValueError: if the folder holds a scan with other settings, or of another model.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _LIVE_SETTINGS}
    vocabulary = sorted(tokenizer.get_vocab().items())
    manifest = {
        "format": 1,
        "settings": settings,
        "revision": getattr(base.model.config, "_commit_hash", None),
        "hidden_size": base.weight.shape[1],
        "lm_head": lm_head_fingerprint(base),
        "tokenizer": fingerprint(repr(vocabulary).encode()),
        "data": fingerprint(Path(config.data).read_bytes())
        if Path(config.data).is_file()
        else config.data,
    }
    if (config.output / MANIFEST).exists():
        found = read_manifest(config.output)
        for name, value in manifest.items():
            if name != "settings" and found.get(name) != value:
                raise ValueError(
                    f"output {str(config.output)!r} holds a scan of another {name}: "
                    f"{found.get(name)}, not {value}"
                )
        for name, value in settings.items():
            if found["settings"].get(name) != value:
                raise ValueError(
                    f"output {str(config.output)!r} holds a scan with {name} "
                    f"{found['settings'].get(name)}, not {value}"
                )
        return found
    return manifest


def lm_head_fingerprint(base: BaseModel) -> str:
    """Of weight and bias in bf16, whatever they run in, and of the transform."""
    tensors = [x.bfloat16() for x in (base.weight, base.bias) if x is not None]
    return fingerprint(*tensors, f"{base.logit_scale} {base.softcap}".encode())


def scan(
    config: ScanConfig,
    base: BaseModel,
    tokenizer,
    *,
    accelerator=None,
    on_rows: Callable[[int, int], None] = lambda rows, tokens: None,
) -> dict:
    """Scans, or continues a scan; returns its manifest, with counts.

    Args:
        accelerator: one of `accelerate`, for several processes.
        on_rows: called with the numbers of rows and of new tokens, whenever this process has come
            further.

    Raises:
        ValueError: for data, settings or shards that cannot be used, by name.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    manifest = begin(config, base, tokenizer)
    if "counts" in manifest:
        return manifest
    if rank == 0:
        write_manifest(config.output, manifest)
    if accelerator:
        accelerator.wait_for_everyone()
    hidden_size = manifest["hidden_size"]
    token_bytes = 2 * hidden_size + 28
    share, held, mine, blocks = 1.0, 0, [], 0
    for number, block in enumerate(_blocks(config, base.vocabulary)):
        blocks += 1
        if number % world != rank:
            continue
        path = shard_path(config.output, number)
        if path.exists():
            on_rows(len(block), 0)
        else:
            _make_shard(
                path, number * config.rows_per_shard, block, base, tokenizer, config, share, on_rows
            )
        _, found, n = read_facts(path, hidden_size)
        mine.append(path)
        held += n
        if found != share:  # it was killed while shards were thinned
            share = min(share, found)
            held = sum(thin(p, hidden_size, config, share) for p in mine)
        while config.max_bytes and held * token_bytes > config.max_bytes / world and held:
            share /= 2
            held = sum(thin(p, hidden_size, config, share) for p in mine)
    if accelerator:
        accelerator.wait_for_everyone()
    if rank == 0:
        manifest = _finish(config, manifest, blocks)
        write_manifest(config.output, manifest)
    if accelerator:
        accelerator.wait_for_everyone()
    return read_manifest(config.output)


def _make_shard(
    path: Path,
    first: int,
    block: list[dict],
    base,
    tokenizer,
    config: ScanConfig,
    share: float,
    on_rows,
) -> None:
    counts = dict.fromkeys(COUNTS, 0) | {"rows": len(block)}
    length = base.row_length(config.max_length)
    encoded = [
        (first + i, encode(tokenizer, row, length, base.vocabulary)) for i, row in enumerate(block)
    ]
    rows = [(number, row) for number, row in encoded if row is not None]
    H = base.weight.shape[1]
    none = torch.zeros(0)
    empty = ScanTokens(torch.zeros(0, H, dtype=torch.bfloat16), none, none, none, *[none.int()] * 4)
    on_rows(len(block) - len(rows), 0)
    parts = [empty]
    for batch in batches_by_length(rows, config.batch_tokens):
        seen = counts["seen"]
        parts.append(scan_batch(base, batch, config, share, counts))
        on_rows(len(batch), counts["seen"] - seen)
    write_shard(path, ScanTokens.in_order(parts), counts, share)


def _finish(config: ScanConfig, manifest: dict, blocks: int) -> dict:
    """One share for all shards, and the sums of their counts."""
    hidden_size = manifest["hidden_size"]
    paths = [shard_path(config.output, number) for number in range(blocks)]
    share = min((read_facts(path, hidden_size)[1] for path in paths), default=1.0)
    kept = sum(thin(path, hidden_size, config, share) for path in paths)
    facts = [read_facts(path, hidden_size)[0] for path in paths]
    counts = {name: sum(fact[name] for fact in facts) for name in COUNTS}
    return {**manifest, "share": share, "shards": blocks, "kept": kept, "counts": counts}
