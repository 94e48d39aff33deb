"""The scan: one forward pass of the frozen model over the data; all a head learns from is written.

Work is cut into blocks of `examples_per_shard` examples, dealt out to the processes; a block
becomes one shard, whole or not at all, and carries its own counts. So a scan that was killed
continues where it was: blocks that are there are not done again, and nothing is counted twice. What
is selected at random is decided by uniforms that belong to the token
(`training/token_uniform.py`).
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
from autodeco_fast.training.data import IGNORED, Example, encode, stream_examples
from autodeco_fast.training.scan_store import (
    COUNTS,
    MANIFEST,
    ScanTokens,
    fingerprint,
    read_facts,
    read_manifest,
    read_shard,
    shard_path,
    token_bytes,
    write_manifest,
    write_shard,
)
from autodeco_fast.training.token_uniform import scan_uniform
from autodeco_fast.training.wishes import augmented

_BUCKETS = {"trivial": TRIVIAL, "middle": MIDDLE, "impossible": IMPOSSIBLE}
_LIVE_SETTINGS = ("batch_tokens", "output")  # may change when a scan is continued
_DEFAULTS = {"wishes": False}  # of settings that scans once did not have


def pad(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels `[B, L]` of examples padded on the right."""
    lengths = [len(example.input_ids) for example in examples]
    shape = len(examples), max(lengths)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for i, (example, n) in enumerate(zip(examples, lengths)):
        ids[i, :n], labels[i, :n] = torch.tensor(example.input_ids), torch.tensor(example.labels)
        mask[i, :n] = 1
    return ids, mask, labels


def _length(item: tuple[int, Example]) -> int:
    return len(item[1].input_ids)


def batches_by_length(
    examples: list[tuple[int, Example]], batch_tokens: int
) -> Iterator[list[tuple[int, Example]]]:
    """Batches of examples of about the same length: `batch_tokens` with padding, or one example."""
    batch: list[tuple[int, Example]] = []
    for item in sorted(examples, key=_length, reverse=True):
        if batch and _length(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _bucket(stats: TokenStats, config: ScanConfig) -> torch.Tensor:
    return difficulty(stats, max_rank=config.max_rank, trivial_prob=config.trivial_prob)


def _selected(
    bucket: torch.Tensor, uniform: torch.Tensor, *, config: ScanConfig, share: float
) -> torch.Tensor:
    """A share of: all of the middle, `easy_fraction` of the trivial, none of the impossible.

    Or a share of all tokens, if the settings say so.
    """
    if config.all_tokens:
        return (bucket >= 0) & (uniform < share)
    easy = (bucket == TRIVIAL) & (uniform < share * config.easy_fraction)
    return ((bucket == MIDDLE) & (uniform < share)) | easy


@torch.inference_mode()
def scan_batch(
    base: BaseModel,
    batch: list[tuple[int, Example]],
    config: ScanConfig,
    *,
    share: float,
    counts: dict[str, int],
) -> ScanTokens:
    """The tokens of some examples that are selected; adds to the counts."""
    device = base.weight.device
    ids, mask, labels = (t.to(device) for t in pad([example for _, example in batch]))
    wanted = labels[:, 1:] != IGNORED
    numbers = torch.tensor([number for number, _ in batch], device=device)
    document = numbers[:, None].expand(wanted.shape)[wanted]
    position = torch.arange(1, ids.shape[1], device=device).expand(wanted.shape)[wanted]
    hidden, target = base.hidden(ids, mask)[:, :-1][wanted], labels[:, 1:][wanted]
    stats = base.stats(hidden, target)
    finite = stats.logsumexp.isfinite()  # a NaN or an infinity in a hidden state is in every logit
    counts["seen"] += len(target)
    counts["not_finite"] += int((~finite).sum())
    bucket = torch.where(finite, _bucket(stats, config), -1)
    selected = _selected(
        bucket, scan_uniform(config.seed, document, position), config=config, share=share
    )
    for name, value in _BUCKETS.items():
        counts[name] += int((bucket == value).sum())
    _count_selected(counts, bucket, selected)
    return ScanTokens(
        hidden=hidden[selected].bfloat16().cpu(),
        gap=(stats.max_logit - stats.target_logit)[selected].cpu(),
        target_prob=(stats.target_logit - stats.logsumexp).exp()[selected].cpu(),
        entropy=stats.entropy[selected].cpu(),
        rank=stats.rank[selected].int().cpu(),
        target=target[selected].int().cpu(),
        document=document[selected].int().cpu(),
        position=position[selected].int().cpu(),
    )


def thin(path: Path, hidden_size: int, *, config: ScanConfig, share: float) -> int:
    """Keeps a smaller share of a shard's tokens; returns how many are left."""
    counts, before, n = read_facts(path, hidden_size)
    if before <= share:
        return n
    tokens = read_shard(path)
    bucket = _bucket(tokens.stats(), config)
    uniform = scan_uniform(config.seed, tokens.document, tokens.position)
    selected = _selected(bucket, uniform, config=config, share=share)
    counts |= dict.fromkeys((f"selected_{name}" for name in _BUCKETS), 0)
    _count_selected(counts, bucket, selected)
    write_shard(path, tokens[selected], counts, share=share)
    return int(selected.sum())


def _count_selected(counts: dict[str, int], bucket: torch.Tensor, selected: torch.Tensor) -> None:
    for name, value in _BUCKETS.items():
        counts[f"selected_{name}"] += int(((bucket == value) & selected).sum())


def _blocks(config: ScanConfig, vocabulary: int) -> Iterator[list[dict]]:
    examples = stream_examples(config.data, config.split, vocabulary)
    examples = augmented(examples) if config.wishes else examples
    while block := list(islice(examples, config.examples_per_shard)):
        yield block


def begin(config: ScanConfig, base: BaseModel, tokenizer) -> dict:
    """The manifest of a scan that begins or continues.

    Raises:
        ValueError: if the folder holds a scan with other settings, or of another model.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _LIVE_SETTINGS}
    vocabulary = sorted(tokenizer.get_vocab().items())
    local = Path(config.data).is_file()
    manifest = {
        "format": 1,
        "settings": settings,
        "revision": getattr(base.model.config, "_commit_hash", None),
        "hidden_size": base.weight.shape[1],
        "lm_head": lm_head_fingerprint(base),
        "tokenizer": fingerprint(repr(vocabulary).encode()),
        "data": fingerprint(Path(config.data).read_bytes()) if local else config.data,
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
            if found["settings"].get(name, _DEFAULTS.get(name)) != value:
                raise ValueError(
                    f"output {str(config.output)!r} holds a scan with {name} "
                    f"{found['settings'].get(name)}, not {value}"
                )
        return found
    return manifest


def lm_head_fingerprint(base: BaseModel) -> str:
    """Of weight, bias and transform, the same in fp32 as in bf16 where the weights are bf16."""
    tensors = [base.weight, *([] if base.bias is None else [base.bias])]
    return fingerprint(
        *(t.bfloat16() for t in tensors), f"{base.logit_scale} {base.softcap}".encode()
    )


def _ignore(examples: int, tokens: int) -> None:
    pass


class _Shards:
    """The shards that one process makes, thinned to one share as they grow beyond `max_bytes`."""

    def __init__(self, config: ScanConfig, base: BaseModel, tokenizer, *, on_examples: Callable):
        self.config, self.base, self.tokenizer = config, base, tokenizer
        self.on_examples = on_examples
        self.hidden_size = base.weight.shape[1]
        self.share, self.tokens, self.paths = 1.0, 0, []

    def add(self, number: int, block: list[dict], limit: float) -> None:
        """Makes the shard of a block, if it is not there; `limit` bytes for all, 0: no limit."""
        path = shard_path(self.config.output, number)
        if path.exists():
            self.on_examples(len(block), 0)
        else:
            self._make(path, number * self.config.examples_per_shard, block)
        _, share, n = read_facts(path, self.hidden_size)
        self.paths.append(path)
        self.tokens += n
        if share != self.share:  # it was killed while shards were thinned
            self._thin(min(share, self.share))
        while limit and self.tokens and self.tokens * token_bytes(self.hidden_size) > limit:
            self._thin(self.share / 2)

    def _thin(self, share: float) -> None:
        self.share = share
        self.tokens = sum(
            thin(p, self.hidden_size, config=self.config, share=share) for p in self.paths
        )

    def _make(self, path: Path, first: int, block: list[dict]) -> None:
        counts = dict.fromkeys(COUNTS, 0) | {"examples": len(block)}
        length = self.base.example_length(self.config.max_length)
        examples = []
        for number, raw in enumerate(block, first):
            example = encode(self.tokenizer, raw, length, vocabulary=self.base.vocabulary)
            if example is not None:
                examples.append((number, example))
        self.on_examples(len(block) - len(examples), 0)
        tokens = [ScanTokens.none(self.hidden_size)]
        for batch in batches_by_length(examples, self.config.batch_tokens):
            seen = counts["seen"]
            tokens.append(
                scan_batch(self.base, batch, self.config, share=self.share, counts=counts)
            )
            self.on_examples(len(batch), counts["seen"] - seen)
        write_shard(path, ScanTokens.in_order(tokens), counts, share=self.share)


def scan(
    config: ScanConfig,
    base: BaseModel,
    tokenizer,
    *,
    accelerator=None,
    on_examples: Callable[[int, int], None] = _ignore,
) -> dict:
    """Scans, or continues a scan; returns its manifest, with counts.

    Args:
        accelerator: one of `accelerate`, for several processes.
        on_examples: called with the numbers of examples and of new tokens, whenever this process
            has come further.

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
    shards, blocks = _Shards(config, base, tokenizer, on_examples=on_examples), 0
    for number, block in enumerate(_blocks(config, base.vocabulary)):
        blocks += 1
        if number % world == rank:
            shards.add(number, block, config.max_bytes / world)
    if accelerator:
        accelerator.wait_for_everyone()
    if rank == 0:
        write_manifest(config.output, _finish(config, manifest, blocks))
    if accelerator:
        accelerator.wait_for_everyone()
    return read_manifest(config.output)


def _finish(config: ScanConfig, manifest: dict, blocks: int) -> dict:
    """One share for all shards, and the sums of their counts."""
    hidden_size = manifest["hidden_size"]
    paths = [shard_path(config.output, number) for number in range(blocks)]
    share = min((read_facts(path, hidden_size)[1] for path in paths), default=1.0)
    tokens = sum(thin(path, hidden_size, config=config, share=share) for path in paths)
    facts = [read_facts(path, hidden_size)[0] for path in paths]
    counts = {name: sum(fact[name] for fact in facts) for name in COUNTS}
    return {**manifest, "share": share, "shards": blocks, "tokens": tokens, "counts": counts}
