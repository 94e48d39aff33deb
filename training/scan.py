"""The scan: one forward pass of the frozen model over the data; all a head learns from is written.

Work is cut into blocks of `examples_per_shard` examples, dealt out to the processes; a block
becomes one shard, whole or not at all, and carries its own counts. So a scan that was killed
continues where it was: blocks that are there are not done again, and nothing is counted twice. What
is selected at random is decided by uniforms that belong to the token
(`training/token_uniform.py`), and where the shards outgrow `max_bytes` all processes halve the
share they keep together. So neither their number nor a kill changes a scan.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from autodeco_fast import TokenStats
from autodeco_fast.losses import IMPOSSIBLE, MIDDLE, TRIVIAL, difficulty
from autodeco_fast.losses.selection import bucket_of
from autodeco_fast.training.base_model import BaseModel, glance
from autodeco_fast.training.config import ScanConfig
from autodeco_fast.training.data import IGNORED, Example, encode, stream_examples
from autodeco_fast.training.processes import Processes
from autodeco_fast.training.scan_store import (
    COUNTS,
    FORMAT,
    MANIFEST,
    ScanTokens,
    all_facts,
    file_fingerprint,
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
from autodeco_fast.urls import Location

_BUCKETS = {"trivial": TRIVIAL, "middle": MIDDLE, "impossible": IMPOSSIBLE}
_LIVE_SETTINGS = ("batch_tokens", "output", "device_map")  # may change when a scan is continued


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


def thin(path: Location, hidden_size: int, *, config: ScanConfig, share: float) -> None:
    """Keeps a smaller share of a shard's tokens."""
    counts, before, _ = read_facts(path, hidden_size)
    if before <= share:
        return
    tokens = read_shard(path)
    # Of the probability that is written: that of a logarithm of it may round to the other side.
    limits = {"max_rank": config.max_rank, "trivial_prob": config.trivial_prob}
    bucket = bucket_of(tokens.rank, tokens.target_prob, **limits)
    uniform = scan_uniform(config.seed, tokens.document, tokens.position)
    selected = _selected(bucket, uniform, config=config, share=share)
    counts |= dict.fromkeys((f"selected_{name}" for name in _BUCKETS), 0)
    _count_selected(counts, bucket, selected)
    write_shard(path, tokens[selected], counts, share=share)


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
        ValueError: if the folder holds a scan with other settings, or of another model, or shards
            of nobody knows what.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _LIVE_SETTINGS}
    vocabulary = sorted(tokenizer.get_vocab().items())
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "revision": getattr(base.model.config, "_commit_hash", None),
        "hidden_size": base.weight.shape[1],
        "lm_head": lm_head_fingerprint(base),
        "tokenizer": fingerprint(repr(vocabulary).encode()),
        "data": _data_of(config),
    }
    if (config.output / MANIFEST).exists():
        found = read_manifest(config.output)
        for name, value in manifest.items():
            if name != "settings" and found.get(name) != value:
                other = "other data" if name == "data" else f"another {name}"
                raise ValueError(
                    f"output {str(config.output)!r} holds a scan of {other}: {found.get(name)}, "
                    f"not {value}; name another folder"
                )
        for name, value in settings.items():
            if found["settings"].get(name) != value:
                raise ValueError(
                    f"output {str(config.output)!r} holds a scan with {name} "
                    f"{found['settings'].get(name)}, not {value}; name another folder"
                )
        return found
    if shard_path(config.output, 0).exists():
        raise ValueError(
            f"output {str(config.output)!r} holds shards of a scan and no {MANIFEST}, which says "
            "what they are of: delete them, or name another folder"
        )
    return manifest


def _data_of(config: ScanConfig) -> str:
    """What tells one set of documents from another."""
    if Path(config.data).is_file():
        return file_fingerprint(Path(config.data))
    return config.data if config.data.startswith("stdlib:") else f"{config.data}:{config.split}"


def lm_head_fingerprint(base: BaseModel) -> str:
    """Of weight, bias and transform, the same in fp32 as in bf16 where the weights are bf16."""
    return fingerprint(
        *(t.bfloat16() for t in base.lm_head()), f"{base.logit_scale} {base.softcap}".encode()
    )


def model_identity(base: BaseModel) -> dict[str, str]:
    """What `training.json` knows a model by that is run while a head is trained."""
    weights = fingerprint(*glance(base.model))
    return {"lm_head": lm_head_fingerprint(base), "weights": weights}


def _ignore(examples: int, tokens: int) -> None:
    pass


class _Shards:
    """The shards that one process makes."""

    def __init__(
        self,
        config: ScanConfig,
        base: BaseModel,
        tokenizer,
        *,
        processes: Processes,
        on_examples: Callable,
    ):
        self.config, self.base, self.tokenizer = config, base, tokenizer
        self.processes, self.on_examples = processes, on_examples
        self.hidden_size = base.weight.shape[1]
        self.share, self.tokens, self.paths = 1.0, 0, []

    def add(self, number: int, block: list[dict]) -> None:
        """Makes the shard of a block, if it is not there; of an empty one there is none. All
        processes must call it as often."""
        path = shard_path(self.config.output, number)
        to_make = bool(block) and not path.exists()
        batches = list(self._batches(number, block)) if to_make else []
        idle = self._forwards_of_others(len(batches))
        if to_make:
            self._make(path, batches, len(block))
        elif block:
            self.on_examples(len(block), 0)
        for _ in range(idle):
            self.base.hidden(torch.zeros(1, 1, dtype=torch.long, device=self.base.weight.device))
        self.processes.wait_for_writer()
        if not block:
            return
        _, share, n = read_facts(path, self.hidden_size)
        self.paths.append(path)
        self.tokens += n
        if share != self.share:  # it was killed while shards were thinned
            self._thin(min(share, self.share))

    def _forwards_of_others(self, mine: int) -> int:
        """Beside so many of its own; 0 unless the processes share the model and have to take part
        in them."""
        if not self.base.sharded:
            return 0
        return int(max(n for (n,) in self.processes.gather([mine]))) - mine

    def fit(self) -> None:
        """Thins the shards of all processes to one share, the largest that `max_bytes` allows; all
        of them must call it as often."""
        limit = self.config.max_bytes
        while limit:
            shares, tokens = zip(*self.processes.gather([self.share, self.tokens]))
            share = min(shares)
            if share == max(shares):
                if sum(tokens) * token_bytes(self.hidden_size) <= limit:
                    return
                share /= 2
            self._thin(share)

    def _thin(self, share: float) -> None:
        self.share = share
        if self.processes.is_writer:
            for path in self.paths:
                thin(path, self.hidden_size, config=self.config, share=share)
        self.processes.wait_for_writer()
        self.tokens = sum(read_facts(path, self.hidden_size)[2] for path in self.paths)

    def _batches(self, number: int, block: list[dict]) -> Iterator[list[tuple[int, Example]]]:
        """The block of this number in batches; examples without a target are left out."""
        length = self.base.example_length(self.config.max_length)
        first, examples = number * self.config.examples_per_shard, []
        options = {"vocabulary": self.base.vocabulary, "ends": self.base.ends}
        for at, raw in enumerate(block, first):
            example = encode(self.tokenizer, raw, length, **options)
            if example is not None:
                examples.append((at, example))
        return batches_by_length(examples, self.config.batch_tokens)

    def _make(
        self, path: Location, batches: list[list[tuple[int, Example]]], examples: int
    ) -> None:
        counts = dict.fromkeys(COUNTS, 0) | {"examples": examples}
        self.on_examples(examples - sum(map(len, batches)), 0)
        tokens = [ScanTokens.none(self.hidden_size)]
        for batch in batches:
            seen = counts["seen"]
            tokens.append(
                scan_batch(self.base, batch, self.config, share=self.share, counts=counts)
            )
            self.on_examples(len(batch), counts["seen"] - seen)
        if self.processes.is_writer:
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
    processes = Processes(accelerator, replicas=base.part is not None)
    manifest = begin(config, base, tokenizer)
    if "counts" in manifest:
        return manifest
    # One that is there stays: where files are replaced in two steps, others would not find it.
    if processes.is_main and not (config.output / MANIFEST).exists():
        write_manifest(config.output, manifest)
    processes.wait()
    shards = _Shards(config, base, tokenizer, processes=processes, on_examples=on_examples)
    rank, found, blocks = processes.rank, _blocks(config, base.vocabulary), 0
    while dealt := list(islice(found, processes.world)):  # the last time, not one for everybody
        shards.add(blocks + rank, dealt[rank] if rank < len(dealt) else [])
        shards.fit()
        blocks += len(dealt)
    processes.wait()
    if processes.is_main:
        write_manifest(config.output, _finish(config, manifest, blocks))
    processes.wait()
    return read_manifest(config.output)


def _finish(config: ScanConfig, manifest: dict, blocks: int) -> dict:
    """The manifest with the share of all shards, and the sums of their counts."""
    facts = list(all_facts(config.output, blocks, manifest["hidden_size"]))
    share = min((share for _, share, _ in facts), default=1.0)
    tokens = sum(n for *_, n in facts)
    counts = {name: sum(fact[name] for fact, *_ in facts) for name in COUNTS}
    return {**manifest, "share": share, "shards": blocks, "tokens": tokens, "counts": counts}
